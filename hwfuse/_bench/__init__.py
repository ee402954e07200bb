"""`hwfuse bench --device cuda`: every implementation beside its floor and the libraries installed.

`shapes` says what is measured, `inputs` makes it, `timing` times it, `measure` puts these together
for one op, shape and M; `worker` does so in a process of its own, `run` leads the workers, `report`
and `plot` show what came out.  `peers` has one file per library.
"""

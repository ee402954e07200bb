"""A process that measures: reads a job from stdin, writes events to stdout, one JSON line each.

In a process of its own, because a kernel that faults takes the whole process' GPU with it.  Events:
``{"start": [op, shape, m, who]}`` before anything can fail, ``{"row": …}`` after, ``{"done": …}``
after a task.  Whatever else is printed goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from hwfuse._bench.shapes import Task


def main() -> None:
    """Do one job: ``{"tasks", "libraries", "replays", "warm", "skip"}``."""
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # compilers and libraries print
    job = json.load(sys.stdin)

    def tell(event: dict[str, Any]) -> None:
        events.write(json.dumps(event) + "\n")

    skip = {tuple(each) for each in job["skip"]}
    _describe(job, tell)
    for fields in job["tasks"]:
        task = Task(*fields)
        _do(task, job, skip, tell)
        tell({"done": list(task)})


def _describe(job: dict[str, Any], tell: Callable[[dict[str, Any]], None]) -> None:
    from hwfuse._bench import about

    if not job["warm"]:
        tell({"about": about.this_machine(), "missing": about.missing(job["libraries"])})


def _do(
    task: Task, job: dict[str, Any], skip: set[tuple[Any, ...]], tell: Callable[[Any], None]
) -> None:
    from hwfuse._bench import measure

    def starting(who: str) -> bool:
        if (*task, who) in skip:
            return False
        tell({"start": [*task, who]})
        return True

    if job["warm"]:
        measure.warm(task, job["libraries"], starting)
        return
    for row in measure.rows(task, job["libraries"], job["replays"], starting):
        tell({"row": row.to_dict()})


if __name__ == "__main__":
    main()

"""The naive loops agree with the reference, by the parity harness."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch

from hwfuse import _spec, testing
from hwfuse.testing import _matrix, naive


def test_loops_pass_parity_for_every_op():
    """Two forms that share no code have the same results, whatever the layout or the routing."""
    rows = _matrix.read(Path(__file__).with_name("parity_matrix.py"))
    # One dtype and few tokens: what differs between two forms are options, tails and edges.
    matrix = {}
    for op, row in rows.items():
        axes = {**row.axes, "m": (0, 9)}
        if "dtype" in axes:
            axes["dtype"] = axes["dtype"][:1]
        matrix[op] = testing.row(**axes)
    with ExitStack() as registered:
        for op in _spec.names():
            loop = getattr(naive, op)
            registered.enter_context(testing.implementation(op, "naive/loop", loop))
        report = testing.run(None, ["naive"], "cpu", matrix=matrix)
    assert [op for op, _, _ in report.lines] == list(_spec.names())
    assert {op: line.failed for (op, _, _), line in report.lines.items() if line.failed} == {}


def test_loop_keeps_a_scale_that_is_a_power_of_two():
    """The largest number 448 * 2**-3 has the scale 2**-3 exactly; random rows have none such."""
    x = torch.full((1, 128), 56.0)
    q, scale = naive.fp8_group_quant(x, scale_format="ue8m0")
    assert scale.item() == 0.125
    assert (q.float() == 448).all()

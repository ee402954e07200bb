"""q_rms_norm_: the numbers of q_rms_norm, written over q and nowhere else."""

import pytest
import torch

from hwfuse import InputError
from hwfuse.ops.q_rms_norm_ import make_inputs
from hwfuse_reference.torch_ops.q_rms_norm import q_rms_norm
from hwfuse_reference.torch_ops.q_rms_norm_ import q_rms_norm_


@pytest.mark.parametrize("m", [0, 1, 7])
def test_slice_of_a_buffer_holds_the_functional_result(m):
    """The columns beside q keep every bit."""
    inputs = make_inputs(m=m, num_q_heads=4, head_dim=64, row_pad=16)
    padding = inputs["q"]._base[:, -16:].clone()
    expected = q_rms_norm(**inputs)
    assert q_rms_norm_(**inputs) is None
    assert torch.equal(inputs["q"], expected)
    assert torch.equal(inputs["q"]._base[:, -16:], padding)


def test_three_dimensional_view_is_written_through():
    """A ``[M, heads, D]`` view of a buffer is legal, too."""
    inputs = make_inputs(m=3, num_q_heads=4, head_dim=64)
    expected = q_rms_norm(**inputs)
    q_rms_norm_(**inputs | {"q": inputs["q"].unflatten(1, (4, 64))})
    assert torch.equal(inputs["q"], expected)


def test_rows_that_overlap_are_refused():
    """An expanded row would be normed once per token."""
    with pytest.raises(InputError, match=r"q.stride\(0\): found 0, needed at least 8: rows that"):
        q_rms_norm_(torch.zeros(8).expand(3, 8), torch.ones(8), head_dim=8)


def test_one_row_of_any_stride_is_accepted():
    """The stride of a single row is never used."""
    q = torch.full((8,), 2.0).as_strided((1, 8), (0, 1))
    q_rms_norm_(q, torch.ones(8), head_dim=8, eps=0.0)
    assert torch.equal(q, torch.ones(1, 8))


def test_bad_argument_is_refused_as_in_the_functional_op():
    """The twins share their checks."""
    with pytest.raises(InputError, match=r"q.shape\[1\]: found 12, needed a positive multiple"):
        q_rms_norm_(torch.zeros(3, 12), torch.ones(8), head_dim=8)

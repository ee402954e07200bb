"""qkv_rms_norm_: the numbers of qkv_rms_norm, written over its inputs and nowhere else."""

import pytest
import torch

from hwfuse import InputError
from hwfuse.ops.qkv_rms_norm_ import make_inputs
from hwfuse_reference.torch_ops.qkv_rms_norm import qkv_rms_norm
from hwfuse_reference.torch_ops.qkv_rms_norm_ import qkv_rms_norm_

W = torch.ones(8)


@pytest.mark.parametrize("m", [0, 1, 7])
def test_slices_of_one_buffer_hold_the_functional_results(m):
    """q, k and v become what qkv_rms_norm returns; the columns beside them keep every bit."""
    inputs = make_inputs(m=m, num_q_heads=4, num_kv_heads=2, head_dim=64, row_pad=16)
    buffer = inputs["q"]._base
    padding = buffer[:, -16:].clone()
    expected = qkv_rms_norm(**inputs)
    assert qkv_rms_norm_(**inputs) is None
    for name, result in zip("qkv", expected, strict=True):
        assert torch.equal(inputs[name], result)
    assert torch.equal(buffer[:, -16:], padding)


def test_three_dimensional_views_are_written_through():
    """``[M, heads, D]`` views of a buffer are legal, too."""
    inputs = make_inputs(m=3, num_q_heads=4, num_kv_heads=2, head_dim=64)
    views = {name: inputs[name].unflatten(1, (-1, 64)) for name in "qkv"}
    expected = qkv_rms_norm(**inputs)
    qkv_rms_norm_(**inputs | views)
    assert all(torch.equal(inputs[n], r) for n, r in zip("qkv", expected, strict=True))


def refused(q, k, v, message):
    """Assert that three heads of 8 are refused."""
    with pytest.raises(InputError, match=message):
        qkv_rms_norm_(q, k, v, W, W, head_dim=8)


@pytest.mark.parametrize("m", [1, 3])
def test_tensors_that_share_elements_are_refused(m):
    """Norming an element twice gives a number that depends on the order of the writes."""
    x = torch.zeros(m, 40)
    shared = "memory shared with {}, needed tensors that do not overlap"
    refused(x[:, :8], x[:, :8], x[:, 8:16], "q: found " + shared.format("k"))
    refused(x[:, :16], x[:, 16:24], x[:, 8:16], "q: found " + shared.format("v"))
    refused(x[:, 8:16], x[:, 23:31], x[:, 16:24], "k: found " + shared.format("v"))


def test_tensor_that_runs_into_the_next_row_of_another_is_refused():
    """A view at the end of the row may wrap into the beginning of the next."""
    flat = torch.zeros(240)
    q = flat.as_strided((3, 8), (40, 1))
    wraps = flat.as_strided((3, 8), (40, 1), 36)
    apart = flat.as_strided((3, 8), (40, 1), 20)
    refused(q, wraps, apart, "q: found memory shared with k")
    last = flat.as_strided((3, 8), (40, 1), 36 + 80)
    qkv_rms_norm_(q, last, apart, W, W, head_dim=8)


def test_rows_that_overlap_are_refused():
    """An expanded row would be normed once per token."""
    x = torch.zeros(3, 24)
    row = torch.zeros(8).expand(3, 8)
    refused(row, x[:, :8], x[:, 8:16], r"q.stride\(0\): found 0, needed at least 8: rows that do")


def test_one_row_of_any_stride_is_accepted():
    """The stride of a single row is never used."""
    q, k, v = torch.ones(3, 8).unbind()
    rows = (x.as_strided((1, 8), (0, 1), x.storage_offset()) for x in (q, k, v))
    qkv_rms_norm_(*rows, W, W, head_dim=8)


def test_stacked_tensors_of_one_storage_are_accepted():
    """Equal columns in different rows are no overlap."""
    q, k, v = torch.randn(3, 5, 8).unbind()
    expected = qkv_rms_norm(q, k, v, W, W, head_dim=8)
    qkv_rms_norm_(q, k, v, W, W, head_dim=8)
    assert all(torch.equal(x, r) for x, r in zip((q, k, v), expected, strict=True))


def test_bad_argument_is_refused_as_in_the_functional_op():
    """The twins share their checks."""
    x = torch.zeros(3, 12)
    with pytest.raises(
        InputError, match=r"q.shape\[1\]: found 12, needed a positive multiple of 8"
    ):
        qkv_rms_norm_(x, x, x, W, W, head_dim=8)

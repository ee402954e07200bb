"""flatten_fp8_group_quant: fp8_group_quant of heads side by side, whatever their strides."""

import pytest
import torch

from hwfuse import InputError, layouts
from hwfuse.ops.flatten_fp8_group_quant import make_inputs
from hwfuse_reference.torch_ops.flatten_fp8_group_quant import flatten_fp8_group_quant
from hwfuse_reference.torch_ops.fp8_group_quant import fp8_group_quant

FNUZ = torch.float8_e4m3fnuz
PAIRS = [(f, y) for f in ("fp32", "ue8m0") for y in ("row", "column", "column_tma")]
PAIRS.append(("ue8m0_packed", "column_tma"))


def by_hand(x, **options):
    """Return the results for rows that are put together head by head."""
    rows = x.new_empty(x.shape[0], x.shape[1] * x.shape[2])
    for h in range(x.shape[1]):
        rows[:, h * x.shape[2] : (h + 1) * x.shape[2]] = x[:, h]
    return fp8_group_quant(rows, **options)


def assert_equal(found, expected):
    """Assert that codes and scales agree in every bit."""
    for x, y in zip(found, expected, strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


@pytest.mark.parametrize("is_heads_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("num_heads", "head_dim"), [(1, 128), (3, 256), (16, 128)])
@pytest.mark.parametrize("m", [0, 1, 5])
def test_heads_of_any_stride_are_laid_side_by_side(m, num_heads, head_dim, dtype, is_heads_first):
    """Head 0 first; a transposed [H, M, D] is read by its strides."""
    x = make_inputs(
        m=m, num_heads=num_heads, head_dim=head_dim, dtype=dtype, is_heads_first=is_heads_first
    )["x"]
    assert x.is_contiguous() is not (is_heads_first and m > 1 and num_heads > 1)
    q, scale = flatten_fp8_group_quant(x)
    assert q.is_contiguous()
    assert_equal((q, scale), by_hand(x))


def test_heads_that_are_slices_of_wider_ones_are_read_by_their_stride():
    """Attention may leave columns between the heads."""
    x = torch.randn(5, 3, 192)[:, :, 32:160]
    assert_equal(flatten_fp8_group_quant(x), by_hand(x))


@pytest.mark.parametrize(("scale_format", "scale_layout"), PAIRS)
def test_options_reach_the_quantisation(scale_format, scale_layout):
    """Layout, format, group size and dtype are those asked for."""
    options = {"scale_format": scale_format, "scale_layout": scale_layout, "group_size": 64}
    inputs = make_inputs(m=5, num_heads=3, fp8=FNUZ, **options)
    q, scale = flatten_fp8_group_quant(**inputs)
    assert_equal((q, scale), by_hand(**inputs))
    assert layouts.matches(scale, scale_layout)


X = torch.ones(3, 2, 256)
BAD = {
    "rank": ({"x": X[0]}, r"x.shape: found \(2, 256\), needed 3 dimensions"),
    "across": (
        {"x": X[..., :192]},
        r"x.shape\[2\]: found 192, needed a positive multiple of group",
    ),
    "no width": ({"x": X[..., :0]}, r"x.shape\[2\]: found 0, needed a positive multiple"),
    "no heads": ({"x": X[:, :0]}, r"x.shape\[1\]: found 0, needed at least 1 head"),
    "dtype": ({"x": X.double()}, "x.dtype: found torch.float64, needed torch.bfloat16"),
    "stride": ({"x": torch.ones(3, 256, 2).mT}, r"x.stride\(-1\): found 2 .*, needed 1"),
    "group_size": ({"group_size": 0}, "group_size: found 0, needed a positive number"),
    "pair": ({"scale_format": "ue8m0_packed"}, "scale_layout: found 'row', needed 'column_tma'"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_argument_is_refused_with_what_was_found_and_needed(change, message):
    """A group of two heads is one of them, although H*D is a multiple: 2 * 192 = 3 * 128."""
    with pytest.raises(InputError, match=message):
        flatten_fp8_group_quant(**{"x": X} | change)

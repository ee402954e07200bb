"""silu_mul_fp8_group_quant: against float64, rounded nowhere in between."""

import math

import pytest
import torch
import torch.nn.functional as F

from hwfuse import InputError, layouts
from hwfuse.ops.silu_mul_fp8_group_quant import COMPARE, make_inputs
from hwfuse.testing.compare import compare
from hwfuse_reference.torch_ops.fp8_group_quant import fp8_group_quant
from hwfuse_reference.torch_ops.silu_mul_fp8_group_quant import silu_mul_fp8_group_quant

FN, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
PAIRS = [(f, y) for f in ("fp32", "ue8m0") for y in ("row", "column", "column_tma")]
PAIRS.append(("ue8m0_packed", "column_tma"))


def product(x):
    """Return silu(gate) * up in float64."""
    gate, up = x[:, : x.shape[1] // 2].double(), x[:, x.shape[1] // 2 :].double()
    return gate / (1 + (-gate).exp()) * up


def refusals(found, expected):
    """Return what the op's comparators say of q and scale."""
    pairs = zip(COMPARE.values(), found, expected, strict=True)
    return [compare(comparator, x, y, {}) for comparator, x, y in pairs]


@pytest.mark.parametrize("fp8", [FN, FNUZ])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("m", "k", "group_size"), [(1, 128, 128), (16, 320, 64), (5, 384, 128)])
def test_results_are_those_of_the_exact_product_rounded_once(m, k, group_size, dtype, fp8):
    """Gate is the first half, up the second."""
    inputs = make_inputs(m=m, k=k, group_size=group_size, dtype=dtype, fp8=fp8, row_pad=8)
    inputs["x"][3::16] = -1.0
    y = product(inputs["x"]).float()
    expected = fp8_group_quant(y, group_size=group_size, dtype=fp8)
    assert refusals(silu_mul_fp8_group_quant(**inputs), expected) == [None, None]


@pytest.mark.parametrize("rounded", ["silu", "product"])
def test_rounding_in_between_is_one_code_off_and_refused(rounded):
    """Kernels that keep the SiLU in bfloat16 are near, but not this op."""
    x = make_inputs(m=16, k=1024)["x"]
    x[[2, 3]] = -1.0
    gate, up = x.chunk(2, dim=1)
    if rounded == "silu":
        y = F.silu(gate.float()).bfloat16().float() * up.float()
    else:
        y = product(x).bfloat16()
    found, expected = fp8_group_quant(y), silu_mul_fp8_group_quant(x)
    assert compare(("fp8_codes", {"max_codes": 1, "share": 0.2}), found[0], expected[0], {}) is None
    assert all(refusals(found, expected))


@pytest.mark.parametrize("gate", [-200.0, -1e30, 200.0, 3e38])
def test_large_gate_overflows_nowhere(gate):
    """exp(-gate) may be infinite: the SiLU is then 0."""
    x = torch.full((1, 256), gate)
    x[0, 128:] = 0.5
    q, scale = silu_mul_fp8_group_quant(x)
    assert (q.float() * scale)[0, 0].item() == pytest.approx(max(gate, 0.0) / 2)


def test_nan_makes_its_group_nan_and_no_other():
    """In gate or in up."""
    x = torch.ones(1, 1024)
    x[0, 5], x[0, 512 + 300] = math.nan, math.nan
    q, scale = silu_mul_fp8_group_quant(x)
    assert scale.isnan().tolist() == [[True, False, True, False]]
    assert torch.equal(q.float().isnan(), scale.isnan().repeat_interleave(128, dim=1))


@pytest.mark.parametrize(("scale_format", "scale_layout"), PAIRS)
@pytest.mark.parametrize("m", [0, 1, 5])
def test_options_reach_the_quantisation(m, scale_format, scale_layout):
    """Layout, format, group size and dtype are those asked for; M = 0 is legal."""
    options = {"scale_format": scale_format, "scale_layout": scale_layout, "group_size": 64}
    inputs = make_inputs(m=m, k=192, fp8=FNUZ, **options)
    y = F.silu(inputs["x"].float()[:, :192]) * inputs["x"].float()[:, 192:]
    q, scale = silu_mul_fp8_group_quant(**inputs)
    expected_q, expected = fp8_group_quant(y, dtype=FNUZ, **options)
    assert q.dtype == FNUZ
    assert torch.equal(q.view(torch.uint8), expected_q.view(torch.uint8))
    assert torch.equal(scale.view(torch.int32), expected.view(torch.int32))
    assert layouts.matches(scale, scale_layout)


X = torch.ones(3, 512)
BAD = {
    "rank": ({"x": X[0]}, r"x.shape: found \(512,\), needed 2 dimensions"),
    "half": (
        {"x": X[:, :384]},
        r"x.shape\[1\]: found 384, needed a positive multiple of 2 \* grou",
    ),
    "empty": ({"x": X[:, :0]}, r"x.shape\[1\]: found 0, needed .* = 256"),
    "dtype": ({"x": X.double()}, "x.dtype: found torch.float64, needed torch.bfloat16"),
    "stride": ({"x": torch.ones(512, 3).t()}, r"x.stride\(-1\): found 3 .*, needed 1"),
    "group_size": ({"group_size": -1}, "group_size: found -1, needed a positive number"),
    "pair": ({"scale_format": "ue8m0_packed"}, "scale_layout: found 'row', needed 'column_tma'"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_argument_is_refused_with_what_was_found_and_needed(change, message):
    """Nothing is cast, cut or copied to make a wrong call fit."""
    with pytest.raises(InputError, match=message):
        silu_mul_fp8_group_quant(**{"x": X} | change)

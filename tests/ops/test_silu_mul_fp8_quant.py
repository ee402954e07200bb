"""silu_mul_fp8_quant: against float64, in the rows that are in use."""

import math

import pytest
import torch
import torch.nn.functional as F

from hwfuse import InputError
from hwfuse.ops.silu_mul_fp8_quant import make_inputs
from hwfuse.testing.compare import fp8_codes
from hwfuse_reference.torch_ops.silu_mul_fp8_quant import silu_mul_fp8_quant

FN = torch.float8_e4m3fn


def codes(y, scale):
    """Return the codes of float32 products."""
    return (y * (1 / scale)).clamp(-448, 448).to(FN)


def offsets(*numbers):
    """Return expert_offsets."""
    return torch.tensor(numbers, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("num_experts", [1, 32])
@pytest.mark.parametrize(("m", "n"), [(0, 128), (1, 128), (33, 256), (257, 96)])
def test_rows_in_use_are_the_exact_product_rounded_once(m, n, num_experts, dtype):
    """Gate is the first half.  The rows after them are NaN here."""
    inputs = make_inputs(m=m, n=n, num_experts=num_experts, dtype=dtype, row_pad=8)
    q = silu_mul_fp8_quant(**inputs)
    assert (q.dtype, q.shape, q.is_contiguous()) == (FN, (m, n), True)
    used = int(inputs["expert_offsets"][-1])
    gate, up = inputs["rows"][:used].double().chunk(2, dim=1)
    y = (gate / (1 + (-gate).exp()) * up).float()
    assert fp8_codes(q[:used], codes(y, inputs["scale"]), max_codes=1, share=1e-3) is None


def test_silu_that_is_rounded_before_the_product_is_one_code_off_and_refused():
    """So do some kernels; it is near, but another op."""
    inputs = make_inputs(m=64, n=512, num_experts=1)
    used = int(inputs["expert_offsets"][-1])
    gate, up = inputs["rows"][:used].chunk(2, dim=1)
    found = codes(F.silu(gate).float() * up.float(), inputs["scale"])
    expected = silu_mul_fp8_quant(**inputs)[:used]
    assert fp8_codes(found, expected, max_codes=1, share=0.1) is None
    assert fp8_codes(found, expected, max_codes=1, share=1e-3)


@pytest.mark.parametrize("bounds", [(0, 0, 0), (0, 2, 2), (0, 0, 3)])
def test_last_offset_alone_says_which_rows_are_in_use(bounds):
    """Experts may be empty, all of them too; what lies behind changes no row before."""
    rows = torch.full((3, 256), math.nan)
    rows[: bounds[-1]] = 2.0
    q = silu_mul_fp8_quant(rows, torch.ones(1), offsets(*bounds))
    assert (q[: bounds[-1]].float() == 3.5).all()  # 3.523


def test_product_beyond_the_range_is_clamped_and_nan_stays():
    """Casts alone give NaN, the limit or zero by type and version."""
    rows = torch.tensor([[1e4, 1e4, math.nan, 1e4, -1e4, 1.0]])
    q = silu_mul_fp8_quant(rows, torch.ones(1), offsets(0, 1))
    assert q.float().nan_to_num(nan=-1).tolist() == [[448.0, -448.0, -1.0]]


ROWS = torch.ones(3, 8)
BAD = {
    "odd": ({"rows": ROWS[:, :5]}, r"rows.shape\[1\]: found 5, needed a positive even number"),
    "empty": ({"rows": ROWS[:, :0]}, r"rows.shape\[1\]: found 0, needed a positive even number"),
    "dtype": ({"rows": ROWS.double()}, "rows.dtype: found torch.float64, needed torch.bfloat16"),
    "stride": ({"rows": torch.ones(8, 3).t()}, r"rows.stride\(-1\): found 3 .*, needed 1"),
    "scale": ({"scale": torch.ones(2)}, r"scale.shape: found \(2,\), needed \(1,\)"),
    "scale dtype": ({"scale": ROWS[0, :1].half()}, "scale.dtype: found torch.float16, needed"),
    "offsets": (
        {"expert_offsets": offsets(0, 1).long()},
        "expert_offsets.dtype: found torch.int64, needed torch.int32",
    ),
    "no expert": (
        {"expert_offsets": offsets(0)},
        r"expert_offsets.shape\[0\]: found 1, needed experts \+ 1, at least 2",
    ),
    "device": (
        {"expert_offsets": offsets(0, 1).to("meta")},
        "expert_offsets.device: found meta, needed cpu, as rows",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_argument_is_refused_with_what_was_found_and_needed(change, message):
    """Nothing is cast, cut or copied to make a wrong call fit."""
    good = {"rows": ROWS, "scale": torch.ones(1), "expert_offsets": offsets(0, 3)}
    with pytest.raises(InputError, match=message):
        silu_mul_fp8_quant(**good | change)

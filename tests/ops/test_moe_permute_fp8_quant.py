"""moe_permute_fp8_quant: each valid route's row is its token, quantised."""

import math

import pytest
import torch

from hwfuse import InputError
from hwfuse.ops.moe_permute_fp8_quant import make_inputs
from hwfuse_reference.torch_ops.moe_permute_fp8_quant import moe_permute_fp8_quant
from hwfuse_reference.torch_ops.w4a8_moe_prep import w4a8_moe_prep

FN = torch.float8_e4m3fn


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("topk", [1, 2, 8])
@pytest.mark.parametrize("m", [0, 1, 4, 33])
def test_row_of_each_valid_route_is_its_token_divided_by_the_scale(m, topk, dtype):
    """Every row up to the number of valid routes is written, by the right token."""
    inputs = make_inputs(m=m, k=96, topk=topk, dtype=dtype, row_pad=32)
    rows = moe_permute_fp8_quant(**inputs)
    assert (rows.dtype, rows.shape, rows.is_contiguous()) == (FN, (m * topk, 96), True)
    written = set()
    for token, of_token in enumerate(inputs["route_to_row"].tolist()):
        for row in of_token:
            if row >= 0:
                scaled = inputs["x"][token].float() * (1 / inputs["scale"])
                assert torch.equal(rows[row].float(), scaled.clamp(-448, 448).to(FN).float())
                written.add(row)
    assert written == set(range(len(written)))


def test_routes_planned_by_prep_are_followed():
    """Rows of an expert lie in its segment; ids -1 and E have none."""
    topk_ids = torch.tensor([[2, -1], [3, 0], [0, 2]], dtype=torch.int32)
    offsets, _, _, route_to_row, _ = w4a8_moe_prep(topk_ids, num_experts=3, n=128, k=128)
    x = torch.tensor([[1.0], [2.0], [3.0]]).expand(3, 128)
    rows = moe_permute_fp8_quant(x.contiguous(), route_to_row, torch.ones(1))[:, 0].float()
    assert offsets.tolist() == [0, 2, 2, 4]
    assert sorted(rows[:2].tolist()) == [2.0, 3.0]
    assert sorted(rows[2:4].tolist()) == [1.0, 3.0]


def test_number_beyond_the_range_is_clamped_and_nan_stays():
    """Casts alone give NaN, the limit or zero by type and version."""
    x = torch.tensor([[1e9, -449.0, math.inf, math.nan, 3.0]])
    rows = moe_permute_fp8_quant(x, torch.zeros(1, 1, dtype=torch.int32), torch.ones(1))
    assert rows.float().nan_to_num(nan=-1).tolist() == [[448.0, -448.0, 448.0, -1.0, 3.0]]


def test_token_of_another_rank_reaches_no_row():
    """Its NaN would be computed with otherwise."""
    x = torch.full((2, 128), math.nan)
    x[1] = 1.0
    routes = torch.tensor([[-1, -1], [1, 0]], dtype=torch.int32)
    rows = moe_permute_fp8_quant(x, routes, torch.ones(1))
    assert (rows[:2].float() == 1).all()


X, ROUTES, ONE = torch.ones(3, 8), torch.full((3, 2), -1, dtype=torch.int32), torch.ones(1)
BAD = {
    "dtype": ({"x": X.double()}, "x.dtype: found torch.float64, needed torch.bfloat16 or"),
    "stride": ({"x": torch.ones(8, 3).t()}, r"x.stride\(-1\): found 3 .*, needed 1"),
    "empty": ({"x": X[:, :0]}, r"x.shape\[1\]: found 0, needed at least 1"),
    "routes": (
        {"route_to_row": ROUTES.long()},
        "route_to_row.dtype: found torch.int64, needed torch.int32",
    ),
    "length": (
        {"route_to_row": ROUTES[:2]},
        r"route_to_row.shape\[0\]: found 2, needed 3, the number of rows of x",
    ),
    "flat": (
        {"route_to_row": ROUTES.flatten()},
        r"route_to_row.shape: found \(6,\), needed 2 dimensions",
    ),
    "scale": ({"scale": torch.ones(3)}, r"scale.shape: found \(3,\), needed \(1,\)"),
    "scale rank": ({"scale": torch.ones(())}, r"scale.shape: found \(\), needed 1 dimensions"),
    "scale dtype": ({"scale": ONE.half()}, "scale.dtype: found torch.float16, needed torch.fl"),
    "device": ({"scale": ONE.to("meta")}, "scale.device: found meta, needed cpu, as x"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_argument_is_refused_with_what_was_found_and_needed(change, message):
    """Nothing is cast, cut or copied to make a wrong call fit."""
    with pytest.raises(InputError, match=message):
        moe_permute_fp8_quant(**{"x": X, "route_to_row": ROUTES, "scale": ONE} | change)

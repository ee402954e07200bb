"""moe_unpermute_reduce: against a loop over routes, with NaN in every row that none points to."""

import math

import pytest
import torch

from hwfuse import InputError
from hwfuse.ops.moe_unpermute_reduce import make_inputs
from hwfuse_reference.torch_ops.moe_unpermute_reduce import moe_unpermute_reduce

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def by_hand(rows, route_to_row, topk_weights, routed_scaling_factor):
    """Return the sums in float64, and the sums of their terms' sizes."""
    out = torch.zeros(len(route_to_row), rows.shape[1], dtype=torch.float64)
    sizes = out.clone()
    for token, of_token in enumerate(route_to_row.tolist()):
        for slot, row in enumerate(of_token):
            if row >= 0:
                term = topk_weights[token, slot].double() * rows[row].double()
                out[token] += routed_scaling_factor * term
                sizes[token] += routed_scaling_factor * term.abs()
    return out, sizes


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("topk", [1, 2, 8])
@pytest.mark.parametrize("m", [0, 1, 4, 33])
def test_sum_of_a_token_s_valid_routes_is_rounded_once(m, topk, dtype):
    """Invalid routes add nothing, whatever lies in the rows that are not in use."""
    inputs = make_inputs(m=m, k=96, topk=topk, dtype=dtype, row_pad=32)
    out = moe_unpermute_reduce(**inputs)
    assert (out.dtype, out.shape, out.is_contiguous()) == (dtype, (m, 96), True)
    expected, sizes = by_hand(**inputs)
    eps = torch.finfo(dtype).eps
    assert ((out.double() - expected).abs() <= 0.51 * eps * expected.abs() + 5e-7 * sizes).all()


def reduce(rows, routes, weights, factor=1.0):
    """Call with one column."""
    out = moe_unpermute_reduce(
        torch.tensor(rows, dtype=torch.bfloat16)[:, None],
        torch.tensor(routes, dtype=torch.int32),
        torch.tensor(weights),
        routed_scaling_factor=factor,
    )
    return out.flatten().tolist()


def test_token_without_valid_routes_is_exactly_zero():
    """Between others and last, on rows that are NaN throughout."""
    nan = math.nan
    assert reduce([3.0, nan], [[0], [-1], [0], [-1]], [[1.0]] * 4) == [3.0, 0.0, 3.0, 0.0]
    assert reduce([nan, nan], [[-1, -1]] * 2, [[0.5, 0.5]] * 2) == [0.0, 0.0]


def test_weight_of_an_invalid_route_is_not_used():
    """It may be anything, too."""
    assert reduce([2.0, 5.0], [[0, -1]], [[0.5, math.nan]]) == [1.0]


def test_factor_multiplies_the_sum_once():
    """Not each term again, and not twice."""
    assert reduce([1.0, 2.0], [[0, 1]], [[1.0, 1.0]], factor=2.5) == [7.5]


def test_weights_and_sum_are_float32():
    """bfloat16 has 1 + 2**-10 as 1, and 256 + 1 as 256."""
    assert reduce([512.0, 512.0], [[0, 1]], [[1 + 2**-10, -1.0]]) == [0.5]
    assert reduce([256.0, 1.0, 256.0], [[0, 1, 2]], [[1.0, 1.0, -1.0]]) == [1.0]


def test_factor_is_applied_before_the_rounding():
    """1.5 * (1 + 3 * 2**-10); the second factor alone is 1 in bfloat16."""
    assert reduce([1.0], [[0]], [[1 + 3 * 2**-10]], factor=1.5) == [1.5 + 2**-7]


def test_buffer_of_rows_may_be_longer_than_the_routes():
    """Engines keep one for the largest batch."""
    assert reduce([1.0, 2.0, math.nan, math.nan], [[1], [0]], [[1.0], [1.0]]) == [2.0, 1.0]


ROWS, ROUTES = torch.ones(6, 8), torch.zeros(3, 2, dtype=torch.int32)
WEIGHTS = torch.ones(3, 2)
BAD = {
    "dtype": ({"rows": ROWS.double()}, "rows.dtype: found torch.float64, needed torch.bfloat16"),
    "stride": ({"rows": torch.ones(8, 6).t()}, r"rows.stride\(-1\): found 6 .*, needed 1"),
    "empty": ({"rows": ROWS[:, :0]}, r"rows.shape\[1\]: found 0, needed at least 1"),
    "routes": (
        {"route_to_row": ROUTES.long()},
        "route_to_row.dtype: found torch.int64, needed torch.int32",
    ),
    "topk": ({"route_to_row": ROUTES[:, :0]}, r"route_to_row.shape\[1\]: found 0, needed at lea"),
    "weights": (
        {"topk_weights": WEIGHTS[:2]},
        r"topk_weights.shape: found \(2, 2\), needed \(3, 2\), as route_to_row",
    ),
    "weights dtype": (
        {"topk_weights": WEIGHTS.bfloat16()},
        "topk_weights.dtype: found torch.bfloat16, needed torch.float32",
    ),
    "device": (
        {"topk_weights": WEIGHTS.to("meta")},
        "topk_weights.device: found meta, needed cpu, as rows",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_argument_is_refused_with_what_was_found_and_needed(change, message):
    """Nothing is cast, cut or copied to make a wrong call fit."""
    good = {"rows": ROWS, "route_to_row": ROUTES, "topk_weights": WEIGHTS}
    with pytest.raises(InputError, match=message):
        moe_unpermute_reduce(**good | change)

"""moe_input_scale: the largest number of the tokens that have a route to an expert here."""

import math

import pytest
import torch

from hwfuse import InputError
from hwfuse.ops.moe_input_scale import make_inputs
from hwfuse_reference.torch_ops.moe_input_scale import moe_input_scale

FLOOR = (torch.tensor(1e-10) / 448).item()


def by_hand(x, topk_ids, num_experts):
    """Return the largest magnitude, token by token."""
    largest = 1e-10
    for row, ids in zip(x.tolist(), topk_ids.tolist(), strict=True):
        if any(0 <= e < num_experts for e in ids):
            largest = max(largest, *map(abs, row))
    return largest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("num_experts", [1, 8, 256])
@pytest.mark.parametrize("topk", [1, 8])
@pytest.mark.parametrize("m", [0, 1, 4, 33])
def test_scale_is_the_largest_number_of_local_tokens_over_448(m, topk, num_experts, dtype):
    """Tokens of other ranks are NaN here."""
    inputs = make_inputs(m=m, k=96, topk=topk, num_experts=num_experts, dtype=dtype, row_pad=32)
    scale = moe_input_scale(**inputs)
    assert (scale.shape, scale.dtype) == ((1,), torch.float32)
    assert scale.item() == (torch.tensor(by_hand(**inputs)) / 448).item()


def scale_of(x, ids, num_experts=4):
    """Call with one column."""
    topk_ids = torch.tensor(ids, dtype=torch.int32)
    return moe_input_scale(torch.tensor(x)[:, None], topk_ids, num_experts=num_experts).item()


@pytest.mark.parametrize("remote", [-1, 4, 5, -(2**31), 2**31 - 1])
@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e9])
def test_what_a_remote_token_holds_is_ignored(garbage, remote):
    """NaN times 0 would be NaN."""
    assert scale_of([garbage, -448.0, 1.0], [[remote, remote], [0, 3], [1, 2]]) == 1.0


@pytest.mark.parametrize("expert", [0, 3])
def test_one_valid_route_is_enough(expert):
    """Whatever the other routes of the token are."""
    assert scale_of([-896.0, 1.0], [[-1, 4, expert], [0, 1, 2]]) == 2.0


def test_magnitude_counts_and_not_the_sign():
    """The largest number may be negative."""
    ids = torch.zeros(1, 1, dtype=torch.int32)
    assert moe_input_scale(torch.tensor([[-896.0, 448.0]]), ids, num_experts=1).item() == 2.0


def test_no_local_token_gives_the_floor():
    """Nothing divides by 0, on a rank that has nothing to do, too."""
    assert scale_of([math.nan, 5.0], [[-1], [4]]) == FLOOR
    assert scale_of([0.0], [[1]]) == FLOOR


def test_nan_of_a_local_token_is_not_hidden():
    """A maximum that drops it would turn a broken layer into a plausible one."""
    assert math.isnan(scale_of([1.0, math.nan], [[0], [1]]))


X, IDS = torch.ones(3, 8), torch.zeros(3, 2, dtype=torch.int32)
BAD = {
    "rank": ({"x": X[0]}, r"x.shape: found \(8,\), needed 2 dimensions"),
    "dtype": ({"x": X.int()}, "x.dtype: found torch.int32, needed torch.bfloat16 or"),
    "stride": ({"x": torch.ones(8, 3).t()}, r"x.stride\(-1\): found 3 .*, needed 1"),
    "empty": ({"x": X[:, :0]}, r"x.shape\[1\]: found 0, needed at least 1"),
    "ids": ({"topk_ids": IDS.long()}, "topk_ids.dtype: found torch.int64, needed torch.int32"),
    "topk": ({"topk_ids": IDS[:, :0]}, r"topk_ids.shape\[1\]: found 0, needed at least 1"),
    "length": ({"topk_ids": IDS[:2]}, r"topk_ids.shape\[0\]: found 2, needed 3, the number of"),
    "device": ({"topk_ids": IDS.to("meta")}, "topk_ids.device: found meta, needed cpu, as x"),
    "experts": ({"num_experts": 0}, "num_experts: found 0, needed at least 1"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_argument_is_refused_with_what_was_found_and_needed(change, message):
    """Nothing is cast, cut or copied to make a wrong call fit."""
    with pytest.raises(InputError, match=message):
        moe_input_scale(**{"x": X, "topk_ids": IDS, "num_experts": 4} | change)

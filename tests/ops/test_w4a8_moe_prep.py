"""w4a8_moe_prep: against lists built one route at a time."""

import pytest
import torch

from hwfuse import InputError
from hwfuse.ops.w4a8_moe_prep import make_inputs
from hwfuse_reference.torch_ops.w4a8_moe_prep import w4a8_moe_prep


def by_hand(topk_ids, num_experts, n, k):
    """Return the five results as lists; an expert's rows in the order of its routes."""
    tokens_of = [[] for _ in range(num_experts)]
    places = []
    for token, ids in enumerate(topk_ids.tolist()):
        for expert in ids:
            places.append((expert, len(tokens_of[expert])) if 0 <= expert < num_experts else None)
            if places[-1]:
                tokens_of[expert].append(token)
    counts = [len(tokens) for tokens in tokens_of]
    offsets = [sum(counts[:e]) for e in range(num_experts + 1)]
    tokens = [token for of_expert in tokens_of for token in of_expert]
    return [
        offsets,
        [[2 * n, count, k] for count in counts],
        [[k, count, n] for count in counts],
        [-1 if place is None else offsets[place[0]] + place[1] for place in places],
        tokens + [0] * (len(places) - len(tokens)),
    ]


def assert_prepared(topk_ids, num_experts):
    """Assert that the reference gives what `by_hand` gives."""
    results = w4a8_moe_prep(topk_ids, num_experts=num_experts, n=256, k=512)
    expected = by_hand(topk_ids, num_experts, 256, 512)
    assert results[3].shape == topk_ids.shape
    assert [t.dtype for t in results] == [torch.int32] * 5
    found = [t.flatten().tolist() if i == 3 else t.tolist() for i, t in enumerate(results)]
    assert found == expected


@pytest.mark.parametrize("m", [0, 1, 4, 33, 257])
@pytest.mark.parametrize("topk", [1, 2, 8])
@pytest.mark.parametrize("num_experts", [1, 8, 32, 256])
def test_results_equal_the_lists_built_route_by_route(num_experts, topk, m):
    """-1 and ids past the last expert sort where they shift no row; experts may be empty."""
    inputs = make_inputs(m=m, topk=topk, num_experts=num_experts)
    assert_prepared(inputs["topk_ids"], num_experts)


@pytest.mark.parametrize("expert", [-1, 4, 99, -(2**31), 2**31 - 1])
def test_all_routes_elsewhere_leave_no_row(expert):
    """Any id outside 0..E-1 is another rank's."""
    topk_ids = torch.full((5, 2), expert, dtype=torch.int32)
    assert_prepared(topk_ids, 4)
    offsets, _, _, route_to_row, row_to_token = w4a8_moe_prep(topk_ids, num_experts=4, n=128, k=128)
    assert offsets.eq(0).all()
    assert route_to_row.eq(-1).all()
    assert row_to_token.eq(0).all()


@pytest.mark.parametrize("expert", [0, 3])
def test_all_routes_on_one_expert_fill_its_rows_in_order(expert):
    """The other experts are empty problems."""
    assert_prepared(torch.full((9, 2), expert, dtype=torch.int32), 4)


def test_rows_of_a_wider_buffer_are_read_by_their_stride():
    """topk_ids may be a slice."""
    wide = torch.randint(-1, 9, (17, 12), dtype=torch.int32)
    assert_prepared(wide[:, 2:6], 8)


def test_maps_are_each_other_s_inverse():
    """The row of a token's route names that token, and lies in its expert's segment."""
    inputs = make_inputs(m=40, topk=4, num_experts=8)
    offsets, _, _, route_to_row, row_to_token = w4a8_moe_prep(**inputs)
    ids = inputs["topk_ids"].long()
    token, slot = ((ids >= 0) & (ids < 8)).nonzero(as_tuple=True)
    row, expert = route_to_row[token, slot].long(), ids[token, slot]
    assert torch.equal(row_to_token[row].long(), token)
    assert ((offsets[expert] <= row) & (row < offsets[expert + 1])).all()
    assert len(row.unique()) == len(row)


IDS = torch.zeros(3, 2, dtype=torch.int32)
BAD = {
    "rank": ({"topk_ids": IDS[0]}, r"topk_ids.shape: found \(2,\), needed 2 dimensions"),
    "dtype": ({"topk_ids": IDS.long()}, "topk_ids.dtype: found torch.int64, needed torch.int32"),
    "stride": ({"topk_ids": IDS.view(2, 3).t()}, r"topk_ids.stride\(-1\): found 3 .*, needed 1"),
    "topk": ({"topk_ids": IDS[:, :0]}, r"topk_ids.shape\[1\]: found 0, needed at least 1"),
    "experts": ({"num_experts": 0}, "num_experts: found 0, needed at least 1"),
    "n": ({"n": 192}, "n: found 192, needed a positive multiple of 128"),
    "k": ({"k": -128}, "k: found -128, needed a positive multiple of 128"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_argument_is_refused_with_what_was_found_and_needed(change, message):
    """Nothing is cast, cut or copied to make a wrong call fit."""
    good = {"topk_ids": IDS, "num_experts": 4, "n": 128, "k": 256}
    with pytest.raises(InputError, match=message):
        w4a8_moe_prep(**good | change)

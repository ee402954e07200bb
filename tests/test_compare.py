"""Each comparator notices what it is for, and lets pass what it says."""

import pytest
import torch

from hwfuse.testing.compare import compare

NAN, INF = float("nan"), float("inf")
BF16, FN, FNUZ = torch.bfloat16, torch.float8_e4m3fn, torch.float8_e4m3fnuz


def verdict(name, found, expected, others=None, **numbers):
    """Apply one comparator as the harness does."""
    return compare((name, numbers), found, expected, others or {})


def moved(x, index, steps):
    """Return x with one element some representable numbers further from zero."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()]
    y = x.clone()
    y.view(integer)[index] += steps
    return y


@pytest.mark.parametrize("name", ["bitwise", "ulps", "fp8_codes", "calc_diff", "rel_frobenius"])
def test_equal_tensors_pass_and_other_forms_never_do(name):
    """Shape and dtype are compared first: nothing broadcasts, nothing is converted."""
    numbers = {
        "ulps": {"max_ulps": 9, "share": 1.0},
        "fp8_codes": {"max_codes": 9, "share": 1.0},
        "calc_diff": {"bound": 9.0},
        "rel_frobenius": {"bound": 9.0},
    }.get(name, {})
    x = torch.randn(4, 5).to(FN)
    assert verdict(name, x.clone(), x, **numbers) is None
    assert verdict(name, x[:0], x[:0], **numbers) is None
    assert "found torch.float8_e4m3fn (1, 5), expected" in verdict(name, x[:1], x, **numbers)
    assert "found torch.bfloat16 (4, 5), expected" in verdict(name, x.to(BF16), x, **numbers)


@pytest.mark.parametrize(("found", "expected"), [(-0.0, 0.0), (1.0, 1.0 + 2**-7), (NAN, 1.0)])
def test_bitwise_catches_every_bit(found, expected):
    """The sign of zero is a bit too."""
    found, expected = (
        torch.tensor([5.0, found], dtype=BF16),
        torch.tensor([5, expected], dtype=BF16),
    )
    assert "1 of 2 elements are wrong" in verdict("bitwise", found, expected)


def test_bitwise_compares_nan_payloads():
    """A copy keeps the payload, so two different NaN are a difference."""
    nans = torch.tensor([0x7FC0, 0x7FC1], dtype=torch.int16).view(BF16)
    assert verdict("bitwise", nans, nans.clone()) is None
    assert "1 of 2" in verdict("bitwise", nans, nans[:1].expand(2))


def test_ulps_counts_steps_and_elements():
    """No element further than max_ulps, and no more elements than the share."""
    x = torch.linspace(-4, 4, 101, dtype=BF16)
    one, two = moved(x, 7, 1), moved(x, 7, 2)
    assert verdict("ulps", one, x, max_ulps=1, share=0.001) is None
    assert "worst 2 ulps off, allowed 1" in verdict("ulps", two, x, max_ulps=1, share=1.0)
    assert "first at (7,)" in verdict("ulps", two, x, max_ulps=1, share=1.0)
    text = verdict("ulps", moved(one, 8, 1), x, max_ulps=1, share=0.001)
    assert "worst 1 ulps off; 1 elements may differ" in text
    assert "1 ulps off; 0 elements may differ" in verdict("ulps", one, x, max_ulps=1, share=0.0)


def test_ulps_of_float32_have_a_bound_of_their_own():
    """All float32 elements may differ, by so many steps; other dtypes keep to the share."""
    numbers = {"max_ulps": 1, "share": 0.0, "float32": 16}
    x = torch.linspace(1, 2, 10)
    assert verdict("ulps", moved(x, slice(None), 16), x, **numbers) is None
    assert "17 ulps off, allowed 16" in verdict("ulps", moved(x, 3, 17), x, **numbers)
    assert "1 of 10" in verdict("ulps", moved(x.to(BF16), 3, 1), x.to(BF16), **numbers)


def test_ulps_crosses_zero_by_one_step_each_side():
    """The smallest numbers of both signs are two steps apart; both zeros are one number."""
    tiny = 2.0**-149
    low, zero, minus = torch.tensor([-tiny]), torch.tensor([0.0]), torch.tensor([-0.0])
    assert verdict("ulps", minus, zero, max_ulps=0, share=0.0) is None
    assert "worst 2 ulps" in verdict("ulps", low, -low, max_ulps=1, share=1.0)


@pytest.mark.parametrize(("found", "expected"), [(NAN, 1.0), (1.0, NAN), (INF, 3e38), (INF, -INF)])
def test_ulps_keeps_nan_and_infinity_apart(found, expected):
    """Infinity is the neighbour of the largest number only in its bits."""
    found, expected = torch.tensor([found]), torch.tensor([expected])
    assert "NaN or infinite" in verdict("ulps", found, expected, max_ulps=2**31, share=1.0)
    assert verdict("ulps", expected, expected.clone(), max_ulps=0, share=0.0) is None


def test_ulps_of_integers_are_exact():
    """Packed exponents have no rounding: one bit off is a factor of two."""
    x = torch.tensor([3, 4], dtype=torch.int32)
    assert verdict("ulps", x, x.clone(), max_ulps=8, share=1.0) is None
    off = torch.tensor([3, 5], dtype=torch.int32)
    assert "1 of 2" in verdict("ulps", off, x, max_ulps=8, share=1.0)


@pytest.mark.parametrize("dtype", [FN, FNUZ])
def test_fp8_codes_counts_codes_in_both_flavours(dtype):
    """One code off on a tie is rounding; two are an error; a NaN is only a NaN."""
    x = torch.tensor([0.5, -240.0, 0.0, NAN]).to(dtype)
    assert verdict("fp8_codes", moved(x, 0, 1), x, max_codes=1, share=0.25) is None
    assert "worst 2 codes" in verdict("fp8_codes", moved(x, 0, 2), x, max_codes=1, share=1.0)
    wrong = torch.tensor([0.5, -240.0, 0.0, 240.0]).to(dtype)
    assert "NaN or infinite" in verdict("fp8_codes", wrong, x, max_codes=255, share=1.0)
    assert "NaN or infinite" in verdict("fp8_codes", x, wrong, max_codes=255, share=1.0)


def test_fp8_codes_refuses_other_dtypes():
    """A wrong COMPARE must not pass by accident."""
    x = torch.ones(2)
    assert "expected an fp8 type" in verdict("fp8_codes", x, x, max_codes=1, share=1.0)


@pytest.mark.parametrize("name", ["calc_diff", "rel_frobenius"])
def test_distance_catches_scale_permutation_and_special_values(name):
    """Noise of 1e-4 passes; a wrong scale, swapped rows, NaN and infinity do not."""
    x = torch.randn(8, 16)
    assert verdict(name, x + 1e-4 * torch.randn(8, 16), x, bound=1e-3) is None
    assert "bound 0.001; 1 of 128" in verdict(name, x * 1.1, x, bound=1e-3)
    assert verdict(name, x.flip(0), x, bound=1e-3)
    assert verdict(name, torch.zeros(8, 16), x, bound=1e-3)
    for special in (NAN, INF):
        wrong = x.clone()
        wrong[3, 5] = special
        assert "NaN and infinities must agree; 1 of 128" in verdict(name, wrong, x, bound=9.0)
        assert verdict(name, wrong, wrong.clone(), bound=1e-3) is None


def test_same_sets_frees_the_order_inside_a_group_only():
    """Rows may swap between routes to one expert, not between experts."""
    groups = torch.tensor([[0, 1], [0, -1]])
    expected = torch.tensor([[0, 2], [1, -1]])
    swapped, crossed = torch.tensor([[1, 2], [0, -1]]), torch.tensor([[0, 1], [2, -1]])
    twice, missing = torch.tensor([[0, 2], [0, -1]]), torch.tensor([[0, 2], [-1, 1]])
    others = {"ids": groups}
    assert verdict("same_sets", swapped, expected, others, groups="ids") is None
    for wrong in (crossed, twice, missing):
        assert "each group has its own" in verdict(
            "same_sets", wrong, expected, others, groups="ids"
        )


def test_inverse_ties_one_map_to_the_other():
    """Row to token must invert the route to row that was found, whatever its order."""
    routes = {"rows": torch.tensor([[1, 2], [0, -1]])}
    expected = torch.tensor([0, 1, 0, 0])  # of the reference, which has another order
    assert verdict("inverse", torch.tensor([1, 0, 0, 0]), expected, routes, of="rows") is None
    assert "both maps must agree; 2 of 4" in verdict(
        "inverse", expected, expected, routes, of="rows"
    )
    tail = torch.tensor([1, 0, 0, 7])
    assert "first at (3,): found 7" in verdict("inverse", tail, expected, routes, of="rows")
    outside = {"rows": torch.tensor([[9, -1]])}
    assert "past the end 4" in verdict("inverse", expected, expected, outside, of="rows")


@pytest.mark.parametrize("used", [torch.tensor([0, 1, 2]), torch.tensor([[1, -1], [-1, 0]])])
def test_valid_rows_frees_the_rows_behind_them_only(used):
    """``expert_offsets`` and ``route_to_row`` say how many rows of an output are specified."""
    others, x = {"used": used}, torch.ones(4, 5)
    tail, row = x.clone(), x.clone()
    tail[2:], row[1] = NAN, 2.0
    assert verdict("bitwise", tail, x, others, valid_rows="used") is None
    assert "5 of 10 elements" in verdict("bitwise", row, x, others, valid_rows="used")
    assert "5 of 10 elements" in verdict("bitwise", x, row, others, valid_rows="used")


def test_rel_frobenius_of_a_computed_scale_has_a_bound_of_its_own():
    """Only where the scale is empty: then the op computed it."""
    x, y = torch.full((4,), 1.02), torch.ones(4)
    numbers = {"bound": 1e-2, "scale": "s", "computed": 3e-2}
    assert compare(("rel_frobenius", numbers), x, y, {"s": torch.ones(1)})
    assert compare(("rel_frobenius", numbers), x, y, {"s": torch.ones(0)}) is None

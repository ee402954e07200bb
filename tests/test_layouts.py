"""Scale layouts: honest strides, exact conversions, aiter's transposed bytes."""

import itertools

import pytest
import torch

from hwfuse import InputError, layouts

SHAPES = [(1, 1), (1, 5), (5, 1), (3, 3), (5, 3), (4, 8), (7, 2)]  # 5x3: neither divides the other


def strides(m, g, layout):
    """Return what the table in hwfuse.layouts says."""
    return {"row": (g, 1), "column": (1, m), "column_tma": (1, -(-m // 4) * 4)}[layout]


def numbered(m, g):
    """Return a scale in which every element tells its place."""
    return torch.arange(m * g, dtype=torch.float32).view(m, g)


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@pytest.mark.parametrize(("m", "g"), SHAPES)
def test_empty_scale_has_the_strides_and_the_storage_of_its_layout(m, g, layout):
    """column_tma owns its padding, which TMA descriptors cover."""
    scale = layouts.empty(m, g, scale_layout=layout)
    assert (scale.shape, scale.stride()) == ((m, g), strides(m, g, layout))
    owned = g * strides(m, g, layout)[1] if layout == "column_tma" else m * g
    assert scale.untyped_storage().nbytes() == 4 * owned
    assert layouts.matches(scale, layout)


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_empty_scale_without_rows_matches_every_layout(layout):
    """At M = 0 no element has an address."""
    scale = layouts.empty(0, 3, scale_layout=layout)
    assert all(layouts.matches(scale, other) for other in layouts.LAYOUTS)


@pytest.mark.parametrize(("m", "g"), SHAPES)
@pytest.mark.parametrize(("layout", "asked"), [*itertools.product(layouts.LAYOUTS, repeat=2)])
def test_layout_matches_another_only_where_all_used_strides_agree(layout, asked, m, g):
    """A dimension of size 1 has no stride, except the pitch of column_tma."""
    scale = layouts.empty(m, g, scale_layout=layout)
    used = [size > 1 for size in (m, g)]
    is_tma = asked == "column_tma"
    used[1] |= is_tma
    pairs = zip(scale.stride(), strides(m, g, asked), used, strict=True)
    agrees = all(found == needed for found, needed, counts in pairs if counts)
    owns = not is_tma or scale.untyped_storage().nbytes() >= 4 * g * strides(m, g, asked)[1]
    assert layouts.matches(scale, asked) == (agrees and owns)


def test_column_tma_strides_without_the_padding_do_not_match():
    """The last column must own its padding rows, too: a descriptor may read them."""
    buffer = torch.zeros(2 * 8)
    assert layouts.matches(buffer.as_strided((5, 2), (1, 8)), "column_tma")
    assert not layouts.matches(torch.empty_strided((5, 2), (1, 8)), "column_tma")
    assert not layouts.matches(torch.zeros(8).as_strided((5, 1), (1, 1)), "column_tma")
    assert not layouts.matches(torch.zeros(17).as_strided((5, 2), (1, 8), 2), "column_tma")


def test_slice_of_rows_no_longer_matches_the_column_layout():
    """A kernel that takes M as the pitch would read other rows."""
    scale = layouts.empty(8, 3, scale_layout="column")[:5]
    assert not layouts.matches(scale, "column")
    assert layouts.matches(scale, "column_tma")  # but 8 is align(5, 4), and the storage suffices


@pytest.mark.parametrize(("m", "g"), SHAPES)
@pytest.mark.parametrize(("source", "target"), [*itertools.product(layouts.LAYOUTS, repeat=2)])
def test_conversion_keeps_every_element_and_gives_the_layout(source, target, m, g):
    """There and back is exact."""
    scale = layouts.convert(numbered(m, g), source)
    result = layouts.convert(scale, target)
    assert layouts.matches(result, target)
    assert torch.equal(result, numbered(m, g))


def test_conversion_of_a_match_is_no_copy():
    """What already lies right is returned as it is."""
    scale = numbered(5, 3)
    assert layouts.convert(scale, "row") is scale


def test_packed_scale_exists_only_in_column_tma():
    """A quarter of the width, int32."""
    scale = layouts.empty(5, 9, scale_layout="column_tma", scale_format="ue8m0_packed")
    assert (scale.dtype, scale.shape, scale.stride()) == (torch.int32, (5, 3), (1, 8))
    assert torch.equal(layouts.convert(scale.clone(), "column_tma"), scale)
    with pytest.raises(InputError, match="found 'row', needed 'column_tma' for 'ue8m0_packed'"):
        layouts.convert(scale, "row")
    with pytest.raises(InputError, match="found 'column', needed 'column_tma' for"):
        layouts.empty(5, 9, scale_layout="column", scale_format="ue8m0_packed")


@pytest.mark.parametrize(("m", "g"), SHAPES)
def test_aiter_s_bytes_are_the_transposed_matrix_there_and_back(m, g):
    """The inverse is view(G, M).t(); the forward trick again is right only for M = G."""
    honest = layouts.convert(numbered(m, g), "column")
    legacy = layouts.to_aiter_legacy(honest)
    assert (legacy.shape, legacy.stride()) == ((m, g), (g, 1))
    in_memory = [honest[row, group].item() for group in range(g) for row in range(m)]
    assert legacy.flatten().tolist() == in_memory
    back = layouts.from_aiter_legacy(legacy)
    assert torch.equal(back, numbered(m, g))
    assert layouts.matches(back, "column")
    assert back.data_ptr() == honest.data_ptr()


def test_aiter_s_form_without_rows_is_empty():
    """M = 0 passes through."""
    empty = layouts.empty(0, 3, scale_layout="column")
    assert layouts.from_aiter_legacy(layouts.to_aiter_legacy(empty)).shape == (0, 3)


BAD = {
    "legacy from rows": (
        lambda: layouts.to_aiter_legacy(numbered(5, 3)),
        r"scale.stride\(\): found \(3, 1\), needed \(1, 5\): convert\(scale, 'column'\) first",
    ),
    "strided legacy": (
        lambda: layouts.from_aiter_legacy(numbered(5, 3).t()),
        r"scale.stride\(\): found \(1, 3\), needed \(5, 1\): aiter's bytes",
    ),
    "layout": (
        lambda: layouts.matches(numbered(5, 3), "tma"),
        "scale_layout: found 'tma', needed 'row' or 'column' or 'column_tma'",
    ),
    "format": (
        lambda: layouts.empty(5, 3, scale_format="fp8"),
        "scale_format: found 'fp8', needed",
    ),
    "rank": (lambda: layouts.matches(torch.ones(3), "row"), r"scale.shape: found \(3,\), needed"),
    "dtype": (
        lambda: layouts.convert(numbered(5, 3).double(), "row"),
        "scale.dtype: found torch.float64, needed torch.float32 or torch.int32",
    ),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_argument_is_refused_with_what_was_found_and_needed(call, message):
    """A misspelt layout is an error, not a silent no."""
    with pytest.raises(InputError, match=message):
        call()

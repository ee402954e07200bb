"""The language of facts: what it says, what it refuses, how it explains itself."""

from __future__ import annotations

import pytest
import torch

from hwfuse import _fact_parser, _report

VALUES = {
    "x": torch.zeros(4, 8, dtype=torch.bfloat16)[:, 1:],
    "m": 4,
    "k": 7,
    "layout": "row",
    "flag": True,
    "dtype": torch.float8_e4m3fn,
    "arch": "sm90",
    "vendor": "nvidia",
}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("m <= 64", True),
        ("m > 64", False),
        ("1 <= m < 4", False),
        ("m % 2 == 0", True),
        ("m * k + 1 - 2 == 27", True),
        ("k // 2 == 3", True),
        ("m == -4", False),
        ("m in (1, 2, 4)", True),
        ("m not in [1, 2, 4]", False),
        ("not m == 4", False),
        ("x.dtype == bfloat16", True),
        ("x.dtype in (float16, float32)", False),
        ("dtype == float8_e4m3fn", True),
        ("x.ndim == 2", True),
        ("x.shape[-1] == 7", True),
        ("x.shape == (4, 7)", True),
        ("x.stride(0) == 8", True),
        ("x.stride(-1) == 1", True),
        ("x.stride() == (8, 1)", True),
        ("x.is_contiguous()", False),
        ("not x.is_contiguous()", True),
        ("x.numel() == 28", True),
        ("x.requires_grad == False", True),
        ("aligned(x, 2)", True),
        ("aligned(x, 16)", False),
        ('matches(x, "row")', False),
        ("layout == 'row'", True),
        ("flag == True", True),
        ("arch == sm90", True),
        ("arch in (gfx942, gfx950)", False),
        ("vendor == 'nvidia'", True),
    ],
)
def test_fact_of_a_call_holds_or_not(source, expected):
    """Each form of the language means what it says in Python."""
    assert _fact_parser.parse(source).holds(VALUES) is expected


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("m <= 2", "needs m <= 2; found m = 4"),
        ("x.dtype == float16", "needs x.dtype == float16; found x.dtype = bfloat16"),
        ("m % 3 == 0", "needs m % 3 == 0; found m % 3 = 1"),
        ("m < k < 6", "needs m < k < 6; found m = 4, k = 7"),
        ("not m == 4", "needs not m == 4; found m = 4"),
        ("aligned(x, 16)", "needs aligned(x, 16); found aligned(x, 16) = False"),
        ("arch == gfx950", "needs arch == gfx950; found arch = sm90"),
    ],
)
def test_fact_that_does_not_hold_says_what_was_found(source, reason):
    """A reason is the statement and the values it looked at."""
    assert _report.reason(_fact_parser.parse(source), VALUES) == reason


@pytest.mark.parametrize(
    "source",
    [
        'x.shape[__import__("os").getpid()] == 1',
        'x.stride(__import__("os").getpid()) == 1',
        "x.shape[m] == 1",
        "x.stride(m) == 1",
        "aligned(x, m)",
        "aligned(x.data, 16)",
        "aligned(x)",
        "x.__class__ == 1",
        "x.shape.__class__ == 1",
        "().__class__ == 1",
        "x.data_ptr() == 0",
        "x.numel(1) == 0",
        "x.stride(dim=0) == 1",
        "open('f') == 1",
        "m ** 9 == 1",
        "m / 2 == 1",
        "m << 3 == 1",
        "m == 1 and k == 1",
        "(m if k else 1) == 1",
        "[i for i in (1, 2)] == 1",
        "(lambda: 1) == 1",
        "(m := 1) == 1",
        "f'{m}' == '4'",
        "aligned(*x)",
    ],
)
def test_fact_outside_the_language_is_refused(source):
    """Nothing passes that could call, assign or reach another object: policy files use it too."""
    with pytest.raises(ValueError, match=r"is not part of the language|needs a comparison"):
        _fact_parser.parse(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("m <=", "'m <=' is not a fact: invalid syntax"),
        ("m", "'m' is not a fact: needs a comparison, such as m <= 64"),
        ("m + 1", "'m + 1' is not a fact: needs a comparison, such as m <= 64"),
        ("m == k ** 2", "'m == k ** 2' is not a fact: 'k ** 2' is not part of the language"),
    ],
)
def test_refused_fact_says_why(source, message):
    """The text shows the fact and the part that is wrong."""
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole text is compared
        _fact_parser.parse(source)
    assert str(error.value) == message


def test_check_names_unknown_name_is_refused_with_a_suggestion():
    """Names are the op's arguments, its sizes, arch and vendor."""
    with pytest.raises(
        ValueError, match=r"^'num_group == 2': unknown name 'num_group' \(did you m"
    ):
        _fact_parser.check_names(_fact_parser.parse("num_group == 2"), ["m", "num_groups"])
    _fact_parser.check_names(_fact_parser.parse("arch == sm90"), [])


def test_holds_when_the_fact_is_a_bug_raises():
    """A bug is no refusal."""
    with pytest.raises(IndexError):
        _fact_parser.parse("x.shape[5] == 1").holds(VALUES)


def test_reads_tells_a_dtype_from_the_rest_of_a_tensor():
    """`bind` knows a promised dtype and nothing else of a tensor."""
    assert _fact_parser.parse("x.dtype == bfloat16").reads == {"x.dtype"}
    fact = _fact_parser.parse("x.stride(0) == m * 2")
    assert fact.reads == {"x", "m"}
    assert _fact_parser.parse("x.dtype == dtype").names == {"x", "dtype"}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("m <= 64", [("m", 64)]),
        ("m == -1", [("m", -1)]),
        ("m % 128 == 0", []),
        ("1 <= m <= 64", []),
        ("layout == 'row'", []),
    ],
)
def test_thresholds_are_the_numbers_a_size_is_compared_with(source, expected):
    """The parity harness looks at both sides of them."""
    assert list(_fact_parser.thresholds(_fact_parser.parse(source))) == expected

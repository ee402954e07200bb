"""FP8 weights: the two flavours of e4m3 by all their 256 codes, and what a scale covers."""

import pytest
import torch

from hwfuse import InputError
from hwfuse.packing import fn_to_fnuz, fnuz_to_fn, rows_per_scale

FN, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz
CODES = torch.arange(256, dtype=torch.uint8)
SCALE = torch.tensor([[0.5, -3.0], [2.0**-20, 7.0]])


def test_every_code_keeps_its_product_with_the_scale():
    """Half the value, twice the scale; NaN stays NaN and -0 becomes 0."""
    weight, scale = fn_to_fnuz(CODES.view(FN), SCALE)
    assert (weight.dtype, scale.dtype) == (FNUZ, torch.float32)
    assert torch.equal(scale, SCALE * 2)
    before, after = CODES.view(FN).double(), weight.double() * 2
    assert before.isnan().sum() == 2
    assert torch.equal(after.isnan(), before.isnan())
    assert torch.equal(after.nan_to_num(), before.nan_to_num())
    assert weight.view(torch.uint8)[0x80] == 0  # -0: this code is fnuz's NaN


def test_reinterpreted_bytes_alone_are_half_the_weight_and_a_nan():
    """Negative control: what happens without the conversion."""
    as_is = CODES.view(FNUZ).double()
    assert as_is[0x38] == CODES.view(FN).double()[0x38] / 2
    assert as_is[0x80].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_there_and_back_keeps_every_code_but_minus_zero(dtype):
    """The scale comes back exactly; NaN comes back as NaN."""
    weight, scale = fnuz_to_fn(*fn_to_fnuz(CODES.view(16, 16).view(FN), SCALE.to(dtype)))
    assert (weight.dtype, weight.shape) == (FN, (16, 16))
    assert torch.equal(scale, SCALE.to(dtype))
    expected = CODES.clone()
    expected[0x80], expected[0xFF] = 0, 0x7F
    assert torch.equal(weight.view(torch.uint8).flatten(), expected)


def test_back_and_there_keeps_every_code_that_e4m3fn_has():
    """All of fnuz but 240 and -240."""
    codes = CODES[(CODES & 0x7F) != 0x7F]
    weight, scale = fn_to_fnuz(*fnuz_to_fn(codes.view(FNUZ), SCALE))
    assert torch.equal(weight.view(torch.uint8), codes)
    assert torch.equal(scale, SCALE)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_240_cannot_become_e4m3fn(code):
    """It would need 480 at half the scale; its byte means NaN there."""
    weight = torch.tensor([0, code, 1], dtype=torch.uint8).view(FNUZ)
    with pytest.raises(
        InputError, match="weight: found 1 elements of size 240, needed at most 224"
    ):
        fnuz_to_fn(weight, SCALE)


def test_arguments_keep_their_bytes_and_strided_weights_are_read_by_their_strides():
    """Nothing is converted in place."""
    codes = CODES.view(16, 16).clone()
    weight, _ = fn_to_fnuz(codes.view(FN).t(), SCALE)
    again, _ = fn_to_fnuz(codes.t().contiguous().view(FN), SCALE)
    assert torch.equal(weight.view(torch.uint8), again.view(torch.uint8))
    assert torch.equal(codes, CODES.view(16, 16))


def test_meta_tensors_give_dtypes_and_shapes():
    """Values are not looked at where there are none."""
    weight, scale = torch.empty(4, 8, dtype=FN, device="meta"), SCALE.to("meta")
    there = fn_to_fnuz(weight, scale)
    back = fnuz_to_fn(*there)
    assert [t.dtype for t in (there[0], back[0])] == [FNUZ, FN]
    assert all(t.is_meta and t.shape == (4, 8) for t in (there[0], back[0]))


@pytest.mark.parametrize(
    ("shape", "num_rows", "expected"),
    [
        ((), 576, None),
        ((1,), 576, None),
        ((576,), 576, 1),
        ((576, 1), 576, 1),
        ((576, 56), 576, 1),  # stored by rows
        ((5, 56), 576, 128),  # four blocks and a short one
        ((4, 2), 512, 128),
        ((1, 1), 128, 128),
    ],
)
def test_shape_of_a_scale_tells_what_a_row_of_it_covers(shape, num_rows, expected):
    """Nothing, a row or a block of 128."""
    assert rows_per_scale(torch.ones(shape), num_rows) == expected


BAD = {
    "dtype": (
        fn_to_fnuz,
        (CODES.view(FNUZ), SCALE),
        "weight.dtype: found .*fnuz, needed .*e4m3fn$",
    ),
    "back": (fnuz_to_fn, (CODES.view(FN), SCALE), "weight.dtype: found .*e4m3fn, needed .*fnuz"),
    "scale": (
        fn_to_fnuz,
        (CODES.view(FN), CODES),
        "scale.dtype: found torch.uint8, needed .*bfloat",
    ),
    "blocks": (
        rows_per_scale,
        (torch.ones(4, 56), 576),
        r"scale.shape: found \(4, 56\), .*\[5, ...\]",
    ),
    "vector": (
        rows_per_scale,
        (torch.ones(5), 576),
        r"scale.shape: found \(5,\), needed \[\] or \[1\]",
    ),
}


@pytest.mark.parametrize(("function", "arguments", "message"), BAD.values(), ids=BAD)
def test_bad_argument_is_refused_with_what_was_found_and_needed(function, arguments, message):
    """Converting twice would halve the weight again: an error of dtype."""
    with pytest.raises(InputError, match=message):
        function(*arguments)

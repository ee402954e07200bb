"""Weight packing: there and back is exact, and the bytes lie where the formula says."""

import pytest
import torch

from hwfuse import InputError
from hwfuse.packing import preshuffle_16x16, unpreshuffle_16x16

SHAPES = [(16, 32), (32, 64), (48, 96), (576, 128)]
DTYPES = [torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.int8, torch.uint8]


def random_bytes(n, k):
    """Return a weight with every bit pattern."""
    return torch.randint(0, 256, (n, k), dtype=torch.uint8)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_preshuffled_byte_lies_where_the_formula_says(n, k):
    """flat(n, k) = n//16 * 16K + k//16 * 256 + n%16 * 16 + k%16."""
    weight = random_bytes(n, k)
    packed = preshuffle_16x16(weight)
    assert (packed.shape, packed.is_contiguous()) == ((n // 16, k // 32, 2, 16, 16), True)
    row, column = torch.arange(n)[:, None], torch.arange(k)[None, :]
    at = row // 16 * 16 * k + column // 16 * 256 + row % 16 * 16 + column % 16
    assert torch.equal(packed.flatten()[at], weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_there_and_back_keeps_every_bit_in_new_memory(n, k, dtype):
    """Neither direction shares storage with its input."""
    weight = random_bytes(n, k).view(dtype)
    packed = preshuffle_16x16(weight)
    back = unpreshuffle_16x16(packed)
    assert back.dtype == dtype
    assert back.is_contiguous()
    assert torch.equal(back.view(torch.uint8), weight.view(torch.uint8))
    assert len({t.untyped_storage().data_ptr() for t in (weight, packed, back)}) == 3


def test_slices_of_16_rows_commute_with_shuffling():
    """Blocks of 16 rows are independent, so a tensor-parallel slice of rows may come after."""
    weight = random_bytes(64, 96)
    assert torch.equal(preshuffle_16x16(weight)[1:3], preshuffle_16x16(weight[16:48]))


def test_strided_weight_is_read_by_its_strides():
    """A transposed or sliced weight gives what its contiguous copy gives."""
    weight = random_bytes(64, 48)
    for strided in (weight.t(), weight[:32, :32]):
        assert torch.equal(preshuffle_16x16(strided), preshuffle_16x16(strided.contiguous()))


BAD = {
    "n": (
        preshuffle_16x16,
        random_bytes(24, 32),
        r"weight.shape\[0\]: found 24, needed a multiple",
    ),
    "k": (
        preshuffle_16x16,
        random_bytes(16, 48),
        r"weight.shape\[1\]: found 48, needed a multiple",
    ),
    "wide": (
        preshuffle_16x16,
        torch.ones(16, 32),
        "weight.dtype: found torch.float32, needed a ty",
    ),
    "twice": (
        preshuffle_16x16,
        preshuffle_16x16(random_bytes(16, 32)),
        r"weight.shape: found \(1, 1, 2, 16, 16\), needed \[N, K\]",
    ),
    "back twice": (
        unpreshuffle_16x16,
        random_bytes(16, 32),
        r"weight.shape: found \(16, 32\), needed \[N/16, K/32, 2, 16, 16\]",
    ),
    "back wide": (
        unpreshuffle_16x16,
        torch.ones(1, 1, 2, 16, 16),
        "weight.dtype: found torch.float32, needed a type of one byte",
    ),
}


@pytest.mark.parametrize(("function", "weight", "message"), BAD.values(), ids=BAD)
def test_bad_weight_is_refused_with_what_was_found_and_needed(function, weight, message):
    """A plain weight taken for a shuffled one, or the reverse, is an error of shape."""
    with pytest.raises(InputError, match=message):
        function(weight)

"""int4 weights: nibbles by hand, and scales by their index formula."""

import pytest
import torch

from hwfuse import InputError
from hwfuse.packing import deinterleave_scales, interleave_scales, pack_int4, unpack_int4


def test_all_pairs_of_values_give_the_byte_of_the_formula_and_come_back():
    """Low nibble is the even index, two's complement: all 256 bytes occur once."""
    values = range(-8, 8)
    weight = torch.tensor([[low, high] for high in values for low in values], dtype=torch.int8)
    packed = pack_int4(weight)
    expected = [(high & 15) << 4 | low & 15 for high in values for low in values]
    assert (packed.dtype, packed.shape) == (torch.int8, (256, 1))
    assert packed.view(torch.uint8).flatten().tolist() == expected
    assert sorted(expected) == list(range(256))
    assert torch.equal(unpack_int4(packed), weight)


@pytest.mark.parametrize("shape", [(6,), (3, 8), (2, 3, 128), (0, 4), (2, 0)])
def test_there_and_back_keeps_shape_and_values_in_new_memory(shape):
    """Any leading dimensions, experts for example."""
    weight = torch.randint(-8, 8, shape, dtype=torch.int8)
    packed = pack_int4(weight)
    assert packed.shape == (*shape[:-1], shape[-1] // 2)
    assert packed.is_contiguous()
    assert torch.equal(unpack_int4(packed), weight)
    assert unpack_int4(packed).is_contiguous()


def test_strided_weight_is_read_by_its_strides():
    """A transposed weight gives what its copy gives."""
    weight = torch.randint(-8, 8, (8, 6), dtype=torch.int8)
    assert torch.equal(pack_int4(weight.t()), pack_int4(weight.t().contiguous()))
    packed = pack_int4(weight)
    assert torch.equal(unpack_int4(packed.t()), unpack_int4(packed.t().contiguous()))


@pytest.mark.parametrize(("num_groups", "i"), [(1, 1), (2, 1), (3, 1), (4, 4), (6, 1), (56, 4)])
@pytest.mark.parametrize("num_rows", [1, 5, 16])
@pytest.mark.parametrize("experts", [(), (1,), (3,)])
def test_scales_lie_where_the_formula_says_and_come_back(experts, num_rows, num_groups, i):
    """out[g // i, n*i + g % i] = scale[n, g], with i = 4 where the groups are a multiple of 4."""
    scale = torch.randn(*experts, num_rows, num_groups).bfloat16()
    out = interleave_scales(scale)
    assert (out.shape, out.dtype) == ((*experts, num_groups // i, num_rows * i), torch.bfloat16)
    for n in range(num_rows):
        for g in range(num_groups):
            assert torch.equal(out[..., g // i, n * i + g % i], scale[..., n, g])
    back = deinterleave_scales(out, num_rows=num_rows)
    assert torch.equal(back, scale)
    tensors = (scale, out, back)
    assert all(t.is_contiguous() for t in tensors)
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == 3


def test_float32_scales_are_rounded_to_bfloat16_once_and_keep_their_sign():
    """A checkpoint's scales are float32, and may be negative."""
    scale = torch.randn(2, 8, 4)
    back = deinterleave_scales(interleave_scales(scale), num_rows=8)
    assert torch.equal(back, scale.bfloat16())
    assert (back < 0).any()


def test_meta_tensors_give_shapes():
    """Values are not looked at where there are none."""
    weight = torch.empty(2, 3, 512, dtype=torch.int8, device="meta")
    packed = pack_int4(weight)
    assert (packed.is_meta, packed.shape) == (True, (2, 3, 256))
    assert unpack_int4(packed).shape == weight.shape
    out = interleave_scales(torch.empty(2, 3, 4, device="meta"))
    assert (out.is_meta, out.shape) == (True, (2, 1, 12))
    assert deinterleave_scales(out, num_rows=3).shape == (2, 3, 4)


BYTES, SCALE = torch.zeros(2, 4, dtype=torch.int8), torch.zeros(3, 8)
BAD = {
    "dtype": (lambda: pack_int4(BYTES.int()), "weight.dtype: found torch.int32, needed torch.int8"),
    "unsigned": (lambda: unpack_int4(BYTES.view(torch.uint8)), "packed.dtype: found torch.uint8"),
    "odd": (lambda: pack_int4(BYTES[:, :3]), r"weight.shape\[-1\]: found 3, needed an even number"),
    "scalar": (
        lambda: pack_int4(BYTES[0, 0]),
        r"weight.shape: found \(\), needed .* one dimension",
    ),
    "large": (lambda: pack_int4(BYTES + 8), "weight: found numbers from 8 to 8, needed -8 to 7"),
    "small": (lambda: pack_int4(BYTES - 9), "weight: found numbers from -9 to -9, needed -8 to 7"),
    "scale dtype": (lambda: interleave_scales(SCALE.half()), "scale.dtype: found torch.float16"),
    "scale rank": (
        lambda: interleave_scales(SCALE[0]),
        r"scale.shape: found \(8,\), needed at least",
    ),
    "back dtype": (
        lambda: deinterleave_scales(SCALE, num_rows=2),
        "scale.dtype: found torch.float32",
    ),
    "rows": (
        lambda: deinterleave_scales(SCALE.bfloat16(), num_rows=4),
        r"scale.shape\[-1\]: found 8, needed 4 or 16: one or four groups",
    ),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_argument_is_refused_with_what_was_found_and_needed(call, message):
    """A nibble cut off would be another weight."""
    with pytest.raises(InputError, match=message):
        call()

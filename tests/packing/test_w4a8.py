"""Repacked W4A8 weights: every number and scale lies where the kernel reads it, and comes back."""

import pytest
import torch

from hwfuse import InputError
from hwfuse.packing import (
    interleave_scales,
    pack_int4,
    repack_w4a8,
    unpack_int4,
    unpack_w4a8,
)

SHAPES = [(1, 64, 128), (2, 192, 384), (3, 128, 512)]  # experts, N, K; one K/128 is odd


def weight(num_experts, n, k):
    """Return a weight with every byte, and scales with every bit pattern, NaN too."""
    b = torch.randint(-128, 128, (num_experts, n, k // 2), dtype=torch.int8)
    bits = torch.randint(-(2**15), 2**15, (num_experts, n, k // 128), dtype=torch.int16)
    return b, interleave_scales(bits.view(torch.bfloat16))


@pytest.mark.parametrize(("num_experts", "n", "k"), SHAPES)
def test_there_and_back_keeps_every_bit_in_new_memory(num_experts, n, k):
    """Neither direction shares storage with its input."""
    b, b_scale = weight(num_experts, n, k)
    blocks, no_scale = repack_w4a8(b, b_scale)
    assert blocks.shape == (num_experts, n // 64, k // 128, 4224)
    assert (blocks.dtype, blocks.is_contiguous()) == (torch.int8, True)
    assert (no_scale.shape, no_scale.dtype) == ((0,), torch.bfloat16)
    back, scale = unpack_w4a8(blocks)
    assert torch.equal(back, b)
    assert torch.equal(scale.view(torch.int16), b_scale.view(torch.int16))
    assert all(t.is_contiguous() for t in (back, scale))
    tensors = (b, b_scale, blocks, back, scale)
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == 5


def test_block_is_what_the_threads_of_a_warpgroup_read():
    """Thread t = 32 warp + 4 g + q finds rows g and g + 8 of its warp, columns 4q of each 16."""
    b, b_scale = weight(1, 128, 256)
    numbers = unpack_int4(b)[0].tolist()
    blocks = repack_w4a8(b, b_scale)[0][0]
    for t in (0, 1, 4, 37, 127):
        warp, g, q = t // 32, t % 32 // 4, t % 4
        for word in range(8):  # of 4 bytes: k32 step, then its half
            start = word // 4 * 2048 + 16 * t + word % 4 * 4
            for i, byte in enumerate(blocks[1, 1, start : start + 4].tolist()):
                column = 128 + 16 * word + 4 * q + i
                for half, (sign, low) in enumerate([(7, 0), (6, 3)]):
                    code = byte >> low & 7
                    found = ~code if byte >> sign & 1 else code
                    assert found == numbers[64 + 16 * warp + 8 * half + g][column]


def test_scales_of_a_block_stand_by_thread():
    """Two rows of a thread side by side, behind the 4096 bytes of numbers."""
    scale = torch.arange(64.0).bfloat16().view(1, 64, 1)
    b = torch.zeros(1, 64, 64, dtype=torch.int8)
    blocks = repack_w4a8(b, interleave_scales(scale))[0]
    found = blocks[0, 0, 0, 4096:].view(torch.bfloat16)
    rows = [16 * w + 8 * half + g for w in range(4) for g in range(8) for half in range(2)]
    assert found.tolist() == rows


def test_scales_of_either_interleave_give_the_same_blocks():
    """They are read as the shape says; going back they are interleaved by 4."""
    scale = torch.randn(2, 64, 4).bfloat16()
    b = torch.randint(-128, 128, (2, 64, 256), dtype=torch.int8)
    by_group = scale.transpose(1, 2).contiguous()
    four, one = repack_w4a8(b, interleave_scales(scale))[0], repack_w4a8(b, by_group)[0]
    assert torch.equal(four, one)


def test_experts_rows_and_columns_of_blocks_are_those_of_the_weight():
    """A tensor-parallel slice of 64 rows or 128 columns, or of experts, may come after."""
    numbers = torch.randint(-8, 8, (3, 128, 256), dtype=torch.int8)
    scale = torch.randn(3, 128, 2).bfloat16()
    blocks = repack_w4a8(pack_int4(numbers), interleave_scales(scale))[0]
    part = numbers[1:, 64:, 128:], scale[1:, 64:, 1:]
    assert torch.equal(
        repack_w4a8(pack_int4(part[0]), interleave_scales(part[1]))[0], blocks[1:, 1:, 1:]
    )


B, S = weight(2, 64, 256)
BAD = {
    "rank": (repack_w4a8, (B[0], S), r"b.shape: found \(64, 128\), needed \[E, N, K/2\]"),
    "n": (repack_w4a8, (B[:, :63], S), r"b.shape\[1\]: found 63, needed a multiple of 64"),
    "k": (repack_w4a8, (B[:, :, :96], S), r"b.shape\[2\]: found 96, needed a multiple of 64"),
    "scale": (repack_w4a8, (B, S[:1]), r"b_scale.shape: found \(1, 2, 64\), needed \[2, G/i"),
    "groups": (repack_w4a8, (B, S[:, :1]), "b_scale.shape: .* factors of 2 groups of 64 rows"),
    "dtype": (repack_w4a8, (B.byte(), S), "dtype: found torch.uint8, needed torch.int8"),
    "blocks": (unpack_w4a8, (B,), r"blocks.shape: found \(2, 64, 128\), needed \[E, N/64, K/128"),
    "bytes": (unpack_w4a8, (repack_w4a8(B, S)[0].byte(),), "blocks.dtype: found torch.uint8"),
}


@pytest.mark.parametrize(("function", "arguments", "message"), BAD.values(), ids=BAD)
def test_bad_argument_is_refused_with_what_was_found_and_needed(function, arguments, message):
    """Nothing is cut or padded."""
    with pytest.raises(InputError, match=message):
        function(*arguments)

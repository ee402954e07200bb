"""The layout in which Hopper's W4A8 GEMM reads its weights: codes and scales block by block.

A block is 64 rows times 128 columns of a weight in 4224 bytes: 4096 of codes, then the bfloat16
scales of its rows.  The kernel copies it whole, and each of 128 threads finds its operands of the
tensor cores in two pieces of 16 bytes.  The rank says what a weight is: a plain one cannot be taken
for a repacked one, nor the other way round.

Thread (warp, g, q) holds rows (warp, half, g) and columns (step, part, q, i) of a block.  One byte
has a number of each half: sign in bit 7 and v or ~v in bits 2-0; in bit 6 and bits 5-3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hwfuse._errors import InputError
from hwfuse.packing.int4 import deinterleave_scales, interleave_scales, pack_int4, unpack_int4

ROWS, COLUMNS, BYTES = 64, 128, 4224
_CODES = ROWS * COLUMNS // 2


def repack_w4a8(b: Tensor, b_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Lay an int4 weight and its scales out as Hopper's kernel reads them, in new memory.

    Args:
        b: ``[E, N, K/2]`` int8, two numbers to a byte as `pack_int4` puts them; N a multiple of 64,
            K of 128.
        b_scale: ``[E, G/i, N*i]`` bfloat16, as `interleave_scales` returns it; G = K / 128.

    Returns:
        blocks: ``[E, N/64, K/128, 4224]`` int8, contiguous: numbers and scales.
        no_scale: ``[0]`` bfloat16, in the place of the scales: the two are a b and a b_scale of
            `w4a8_grouped_gemm`.

    Raises:
        InputError: another rank, dtype or size.

    Memory: beside the results, a few times that of one expert.
    """
    _check_plain(b, b_scale)
    n, num_groups = b.shape[1], b.shape[2] * 2 // COLUMNS
    blocks = b.new_empty(len(b), n // ROWS, num_groups, BYTES)
    for packed, interleaved, out in zip(b, b_scale, blocks, strict=True):
        out[..., :_CODES] = _codes(unpack_int4(packed))
        scale = deinterleave_scales(interleaved, num_rows=n).unflatten(0, (-1, 4, 2, 8))
        scales = scale.permute(0, 4, 1, 3, 2).contiguous()  # blocks, warp, g, half
        out[..., _CODES:] = scales.flatten(2).view(torch.int8)
    return blocks, b_scale.new_empty(0)


def unpack_w4a8(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Undo `repack_w4a8`; the scales come as `interleave_scales` orders them, in new memory."""
    if blocks.ndim != 4 or blocks.shape[3] != BYTES:
        needed = f"[E, N/{ROWS}, K/{COLUMNS}, {BYTES}]"
        raise InputError("blocks.shape", tuple(blocks.shape), needed)
    if blocks.dtype != torch.int8:
        raise InputError("blocks.dtype", blocks.dtype, "torch.int8")
    num_experts, rows, num_groups, _ = blocks.shape
    b = blocks.new_empty(num_experts, rows * ROWS, num_groups * COLUMNS // 2)
    scale = blocks.new_empty(num_experts, rows * ROWS, num_groups, dtype=torch.bfloat16)
    for of_expert, packed, out in zip(blocks, b, scale, strict=True):
        packed.copy_(pack_int4(_numbers(of_expert[..., :_CODES])))
        scales = of_expert[..., _CODES:].contiguous().view(torch.bfloat16)
        scales = scales.unflatten(2, (4, 8, 2)).permute(0, 2, 4, 3, 1)
        out.copy_(scales.reshape(out.shape))
    return b, interleave_scales(scale)


def _codes(numbers: Tensor) -> Tensor:
    """Return the codes of ``[N, K]`` int8 as ``[N/64, K/128, 4096]``."""
    magnitudes, signs = (numbers ^ (numbers >> 7)) & 7, numbers & 8
    (low, high), (low_sign, high_sign) = (
        x.unflatten(0, (-1, 4, 2, 8)).unbind(2) for x in (magnitudes, signs)
    )
    codes = low_sign << 4 | high_sign << 3 | high << 3 | low
    by_thread: Tensor = codes.unflatten(3, (-1, 2, 2, 2, 4, 4)).permute(0, 3, 4, 1, 2, 7, 5, 6, 8)
    return by_thread.flatten(2)


def _numbers(codes: Tensor) -> Tensor:
    """Undo `_codes`."""
    by_thread = codes.unflatten(2, (2, 4, 8, 4, 2, 2, 4))
    codes = by_thread.permute(0, 3, 4, 1, 2, 6, 7, 5, 8).flatten(3)  # blocks, warp, g, columns
    low = codes & 7 ^ codes >> 7
    high = codes >> 3 & 7 ^ codes << 1 >> 7  # a right shift copies the sign
    return torch.stack([low, high], dim=2).flatten(0, 3)


def _check_plain(b: Tensor, b_scale: Tensor) -> None:
    if b.ndim != 3:
        raise InputError("b.shape", tuple(b.shape), "[E, N, K/2], three dimensions")
    if b_scale.ndim != 3 or len(b_scale) != len(b):
        raise InputError("b_scale.shape", tuple(b_scale.shape), f"[{len(b)}, G/i, N*i]")
    if b.shape[1] % ROWS:
        raise InputError("b.shape[1]", b.shape[1], f"a multiple of {ROWS}")
    if b.shape[2] * 2 % COLUMNS:
        raise InputError("b.shape[2]", b.shape[2], f"a multiple of {COLUMNS // 2}")
    interleave = b_scale.shape[2] // max(b.shape[1], 1)
    if b_scale.shape[1] * interleave * COLUMNS != b.shape[2] * 2:
        needed = f"factors of {b.shape[2] * 2 // COLUMNS} groups of {b.shape[1]} rows"
        raise InputError("b_scale.shape", tuple(b_scale.shape), needed)

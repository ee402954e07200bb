"""The fp8_group_quant family where a row to normalise, or a group, is too long for registers.

One program takes a row, piece by piece, and reads it several times: from a cache, mostly.
"""

import functools

import torch
import triton
import triton.language as tl

from hwfuse_triton._fp8 import largest_bits, scales, store_codes, store_scales
from hwfuse_triton._launch import Launch

LONGEST = 32768  # elements of a row or a group that registers hold
_PIECE = 8192
_THREADS = 512


@triton.jit
def _load(x_ptr, residual_ptr, weight_ptr, at, column, mask, K, MODE: tl.constexpr):
    """Return what is quantised at *column* of a row of K, up to the factor of the whole row."""
    y = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if MODE == "silu":
        up = tl.load(x_ptr + K + at, mask=mask, other=0.0).to(tl.float32)
        y = y / (1.0 + tl.exp(-y)) * up
    if MODE == "add norm":
        y += tl.load(residual_ptr + column, mask=mask, other=0.0).to(tl.float32)
    if MODE == "norm" or MODE == "add norm":  # noqa: PLR1714 - tuples are not constant in Triton
        y *= tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    return y


@triton.jit(do_not_specialize=["num_rows", "x_stride", "other_stride", "pitch", "eps"])
def long_rows_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    q_ptr,
    scale_ptr,
    residual_out_ptr,
    norm_ptr,
    num_rows,  # noqa: ARG001 - as the kernels for short rows
    x_stride,  # in UNIT elements
    other_stride,  # likewise: of the residual, or from head to head
    pitch,
    eps,
    NUM_GROUPS: tl.constexpr,
    HEAD_GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    MODE: tl.constexpr,
    NORM: tl.constexpr,
    BY_ROW: tl.constexpr,
    FORMAT: tl.constexpr,
    QMAX: tl.constexpr,
    CLAMP: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Quantise one row; a piece is BLOCK_GROUPS groups, or BLOCK_SIZE elements of one."""
    K: tl.constexpr = NUM_GROUPS * GROUP_SIZE
    PACKED: tl.constexpr = FORMAT == "ue8m0_packed"
    PER_ROW: tl.constexpr = (NUM_GROUPS + 3) // 4 * 4 if PACKED else NUM_GROUPS
    PIECE: tl.constexpr = BLOCK_GROUPS * BLOCK_SIZE
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride * UNIT
    head_stride = 0
    if MODE == "add norm":
        residual_ptr += row * other_stride * UNIT
        residual_out_ptr += row * K
    else:
        head_stride = other_stride.to(tl.int64) * UNIT
    q_ptr += row * K
    norm_ptr += row * K

    r = 1.0
    if MODE == "norm" or MODE == "add norm":  # noqa: PLR1714
        squares = tl.zeros((PIECE,), tl.float32)
        for first in range(0, K, PIECE):
            column = first + tl.arange(0, PIECE)
            t = tl.load(x_ptr + column, mask=column < K, other=0.0).to(tl.float32)
            if MODE == "add norm":
                t += tl.load(residual_ptr + column, mask=column < K, other=0.0).to(tl.float32)
                total = t.to(residual_out_ptr.dtype.element_ty)
                tl.store(residual_out_ptr + column, total, mask=column < K)
            squares += t * t
        r = tl.rsqrt(tl.sum(squares, 0) * (1.0 / K) + eps)

    for first in range(0, PER_ROW, BLOCK_GROUPS):
        group = first + tl.arange(0, BLOCK_GROUPS)
        start = (group % HEAD_GROUPS * GROUP_SIZE + group // HEAD_GROUPS * head_stride)[:, None]
        largest = tl.zeros((BLOCK_GROUPS,), tl.int32)
        for part in range(0, GROUP_SIZE, BLOCK_SIZE):
            inner = part + tl.arange(0, BLOCK_SIZE)[None, :]
            column = group[:, None] * GROUP_SIZE + inner
            mask = (group < NUM_GROUPS)[:, None] & (inner < GROUP_SIZE)
            y = _load(x_ptr, residual_ptr, weight_ptr, start + inner, column, mask, K, MODE)
            largest = tl.maximum(largest, largest_bits(y))
        bits = (largest.to(tl.float32, bitcast=True) * r).to(tl.int32, bitcast=True)
        scale, inverse = scales(bits, QMAX, FORMAT != "fp32", EXACT=True)
        store_scales(
            scale_ptr, scale, row, group, group < PER_ROW, pitch, NUM_GROUPS, BY_ROW, PACKED
        )
        for part in range(0, GROUP_SIZE, BLOCK_SIZE):
            inner = part + tl.arange(0, BLOCK_SIZE)[None, :]
            column = group[:, None] * GROUP_SIZE + inner
            mask = (group < NUM_GROUPS)[:, None] & (inner < GROUP_SIZE)
            y = _load(x_ptr, residual_ptr, weight_ptr, start + inner, column, mask, K, MODE)
            y *= r
            if NORM:
                tl.store(norm_ptr + column, y.to(norm_ptr.dtype.element_ty), mask=mask)
            store_codes(q_ptr, column, y * inverse[:, None], mask, QMAX, CLAMP)


@functools.cache
def launch(
    num_groups, head_groups, group_size, unit, mode, by_row, scale_format, dtype, wave, rounds,
    pdl, *, norm=False,
):  # fmt: skip
    """Return the launch of one program per row."""
    block_size = min(triton.next_power_of_2(group_size), _PIECE)
    return Launch(
        long_rows_kernel,
        num_warps=_THREADS // wave,
        pdl=pdl,
        NUM_GROUPS=num_groups,
        HEAD_GROUPS=head_groups,
        GROUP_SIZE=group_size,
        UNIT=unit,
        MODE=mode,
        NORM=norm,
        BY_ROW=by_row,
        FORMAT=scale_format,
        QMAX=torch.finfo(dtype).max,
        CLAMP=wave == 64 or not rounds,
        BLOCK_GROUPS=_PIECE // block_size,
        BLOCK_SIZE=block_size,
    )

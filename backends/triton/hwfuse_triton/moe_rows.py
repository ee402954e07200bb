"""The ops on the rows of a w4a8 mixture of experts in Triton: scale, permute, activation, reduce.

They move bytes: a program takes one piece of 16-byte vectors per thread, and where a routing can
leave most rows unused, programs walk over the rows that are in use instead of being launched for
all of them, because 0.6 ns per program is what an accelerator takes to start one.
"""

import functools

import torch
import triton
import triton.language as tl

from hwfuse.ops import moe_input_scale as input_scale_spec
from hwfuse.ops import moe_permute_fp8_quant as permute_spec
from hwfuse.ops import moe_unpermute_reduce as reduce_spec
from hwfuse.ops import silu_mul_fp8_quant as silu_spec
from hwfuse_triton._fp8 import rounds, store_codes
from hwfuse_triton._launch import Launch, empty, has_pdl

# Elements per program, the best of some that were tried on an H200.
_AMAX_BLOCK = 4096
_PERMUTE_BLOCK = 2048
_REDUCE_BLOCK = 1024
_SILU_TILE = 1024
_MAX_PROGRAMS = 2048  # of the loops over rows: 15 or more to each multiprocessor
# Programmatic dependent launch saves time up to so many elements; with more, the early start of
# the next kernel only takes the place of programs on the device.
_PDL_ELEMENTS = 2**22
_FLOOR = tl.constexpr(0x2EDBE6FF)  # the bits of 1e-10, the least that a scale is made for
_QMAX = tl.constexpr(448.0)  # of float8_e4m3fn


@triton.jit
def _magnitude(x):
    """Return the bits of abs(x): they are in the order of the numbers, NaN above all of them."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scale_of(bits):
    """Return the scale that makes the largest magnitude QMAX; the division is IEEE's."""
    return tl.div_rn(tl.maximum(bits, _FLOOR).to(tl.float32, bitcast=True), _QMAX)


@triton.jit
def wait(PDL: tl.constexpr):
    """Wait for the kernel before, with a dependent launch; then let the next one start."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit(do_not_specialize=["num_tokens", "x_stride", "ids_stride", "num_experts"])
def token_amax_kernel(
    x_ptr,
    ids_ptr,
    bits_ptr,  # one number per program
    num_tokens,
    x_stride,  # in UNIT elements: a factor in the code proves the alignment of rows
    ids_stride,
    num_experts,
    K: tl.constexpr,
    TOPK: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_TOPK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait(PDL)
    CHUNKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    slot = tl.arange(0, BLOCK_TOPK)
    stride = x_stride.to(tl.int64) * UNIT
    largest = tl.zeros([BLOCK_K], tl.int32)
    for item in range(tl.program_id(0), num_tokens * CHUNKS, tl.num_programs(0)):
        token = item // CHUNKS
        column = item % CHUNKS * BLOCK_K + tl.arange(0, BLOCK_K)
        # Tokens of other ranks are read too: waiting for the ids costs more than reading in vain.
        x = tl.load(x_ptr + token * stride + column, mask=column < K, other=0.0)
        expert = tl.load(
            ids_ptr + token * ids_stride.to(tl.int64) + slot, mask=slot < TOPK, other=-1
        )
        is_valid = (expert >= 0) & (expert < num_experts)
        is_here = tl.max(is_valid.to(tl.int32), axis=0) > 0
        largest = tl.maximum(largest, tl.where(is_here, _magnitude(x), 0))
    tl.store(bits_ptr + tl.program_id(0), tl.max(largest, axis=0))


@triton.jit(do_not_specialize=["count"])
def scale_kernel(bits_ptr, scale_ptr, count, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait(PDL)
    i = tl.arange(0, BLOCK)
    bits = tl.load(bits_ptr + i, mask=i < count, other=0)
    tl.store(scale_ptr, _scale_of(tl.max(bits, axis=0)))


@triton.jit(do_not_specialize=["x_stride", "route_stride"])
def permute_kernel(
    x_ptr,
    route_ptr,
    scale_ptr,
    rows_ptr,
    x_stride,  # in UNIT elements
    route_stride,
    K: tl.constexpr,
    TOPK: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_TOPK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait(PDL)
    CHUNKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    token = (tl.program_id(0) // CHUNKS).to(tl.int64)
    column = tl.program_id(0) % CHUNKS * BLOCK_K + tl.arange(0, BLOCK_K)
    slot = tl.arange(0, BLOCK_TOPK)
    route_ptr += token * route_stride
    rows = tl.load(route_ptr + slot, mask=slot < TOPK, other=-1)
    if tl.max(rows, axis=0) >= 0:  # a token of other ranks is not read
        x = tl.load(x_ptr + token * x_stride * UNIT + column, mask=column < K)
        y = x.to(tl.float32) * tl.div_rn(1.0, tl.load(scale_ptr))
        for j in tl.range(0, TOPK, loop_unroll_factor=8):
            row = tl.load(route_ptr + j)
            mask = (column < K) & (row >= 0)
            store_codes(rows_ptr, row.to(tl.int64) * K + column, y, mask, _QMAX, CLAMP=True)


@triton.jit
def _gated(rows_ptr, row, column, used, stride, N: tl.constexpr):
    """Return silu(gate) * up of a tile in float32, and where it lies in the rows in use."""
    mask = (row < used)[:, None] & (column < N)[None, :]
    at = rows_ptr + row.to(tl.int64)[:, None] * stride + column[None, :]
    gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(at + N, mask=mask, other=0.0).to(tl.float32)
    return gate / (1 + tl.exp(-gate)) * up, mask


@triton.jit(do_not_specialize=["num_experts", "stride"])
def silu_kernel(
    rows_ptr,
    scale_ptr,
    offsets_ptr,
    q_ptr,
    num_experts,
    stride,  # in UNIT elements
    N: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    wait(PDL)
    CHUNKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    used = tl.load(offsets_ptr + num_experts)
    inverse = tl.div_rn(1.0, tl.load(scale_ptr))
    row_stride = stride.to(tl.int64) * UNIT
    for tile in range(tl.program_id(0), tl.cdiv(used, BLOCK_ROWS) * CHUNKS, tl.num_programs(0)):
        row = tile // CHUNKS * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        column = tile % CHUNKS * BLOCK_N + tl.arange(0, BLOCK_N)
        y, mask = _gated(rows_ptr, row, column, used, row_stride, N)
        at = row.to(tl.int64)[:, None] * N + column[None, :]
        store_codes(q_ptr, at, y * inverse, mask, _QMAX, CLAMP=True)


@triton.jit(do_not_specialize=["num_experts", "stride"])
def silu_amax_kernel(
    rows_ptr,
    offsets_ptr,
    result_ptr,
    num_experts,
    stride,  # in UNIT elements
    N: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    wait(PDL)
    CHUNKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    used = tl.load(offsets_ptr + num_experts)
    row_stride = stride.to(tl.int64) * UNIT
    largest = tl.zeros([BLOCK_ROWS, BLOCK_N], tl.int32)
    for tile in range(tl.program_id(0), tl.cdiv(used, BLOCK_ROWS) * CHUNKS, tl.num_programs(0)):
        row = tile // CHUNKS * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        column = tile % CHUNKS * BLOCK_N + tl.arange(0, BLOCK_N)
        y, mask = _gated(rows_ptr, row, column, used, row_stride, N)
        largest = tl.maximum(largest, tl.where(mask, _magnitude(y), 0))
    tl.store(result_ptr + tl.program_id(0), tl.max(tl.max(largest, axis=1), axis=0))


@triton.jit(do_not_specialize=["factor", "rows_stride", "route_stride", "weight_stride"])
def reduce_kernel(
    rows_ptr,
    route_ptr,
    weight_ptr,
    out_ptr,
    factor,
    rows_stride,  # in UNIT elements
    route_stride,
    weight_stride,
    K: tl.constexpr,
    TOPK: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLOTS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait(PDL)
    CHUNKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    token = (tl.program_id(0) // CHUNKS).to(tl.int64)
    column = tl.program_id(0) % CHUNKS * BLOCK_K + tl.arange(0, BLOCK_K)
    route_ptr += token * route_stride
    weight_ptr += token * weight_stride
    total = tl.zeros([BLOCK_K], tl.float32)
    # Several rows are one load: one by one, a row's load would wait for the route of the next.
    for first in range(0, TOPK, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        row = tl.load(route_ptr + slot, mask=slot < TOPK, other=-1)
        weight = tl.load(weight_ptr + slot, mask=slot < TOPK, other=0.0)
        # Nothing is multiplied by 0: what no route points to may be NaN.
        weight = tl.where(row >= 0, weight, 0.0)[:, None]
        at = rows_ptr + row.to(tl.int64)[:, None] * rows_stride * UNIT + column[None, :]
        value = tl.load(at, mask=(row >= 0)[:, None] & (column < K)[None, :], other=0.0)
        total += tl.sum(weight * value.to(tl.float32), axis=0)
    total = (total * factor).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * K + column, total, mask=column < K)


def in_units(x, m):
    """Return the row stride in units, and the unit: 16 bytes, or one element where rows lie oddly.

    The stride of a single row may be any number: it must not choose the slow variant.
    """
    vector = 16 // x.element_size()
    stride = x.stride(0) if m > 1 else 0
    return (stride // vector, vector) if stride % vector == 0 else (stride, 1)


def _blocks(width, largest):
    """Return the block for a width and the number of blocks; a little waste beats many programs."""
    block = min(largest, triton.next_power_of_2(width))
    return block, -(-width // block)


@functools.cache
def _amax_launch(k, topk, unit, pdl, wave):
    block_k, chunks = _blocks(k, _AMAX_BLOCK)
    return chunks, Launch(
        token_amax_kernel,
        num_warps=128 // wave,
        pdl=pdl,
        K=k,
        TOPK=topk,
        UNIT=unit,
        BLOCK_K=block_k,
        BLOCK_TOPK=triton.next_power_of_2(topk),
    )


@functools.cache
def _scale_launch(pdl, wave):
    return Launch(scale_kernel, num_warps=8 * 32 // wave, pdl=pdl, BLOCK=_MAX_PROGRAMS)


def moe_input_scale(x, topk_ids, *, num_experts, wave=32):
    m, k, topk = input_scale_spec.sizes(x, topk_ids, num_experts=num_experts)
    stride, unit = in_units(x, m)
    pdl = has_pdl(x.get_device())
    chunks, launch = _amax_launch(k, topk, unit, pdl, wave)
    programs = min(_MAX_PROGRAMS, max(1, m * chunks))
    partial = empty(x, (programs,), torch.int32)
    launch(programs, x, topk_ids, partial, m, stride, topk_ids.stride(0), num_experts)
    scale = empty(x, (1,), torch.float32)
    _scale_launch(pdl, wave)(1, partial, scale, programs)
    return scale


@functools.cache
def _permute_launch(k, topk, unit, pdl, wave):
    block_k, chunks = _blocks(k, _PERMUTE_BLOCK)
    return chunks, Launch(
        permute_kernel,
        num_warps=max(1, block_k // (16 * wave)),
        pdl=pdl,
        K=k,
        TOPK=topk,
        UNIT=unit,
        BLOCK_K=block_k,
        BLOCK_TOPK=triton.next_power_of_2(topk),
    )


def moe_permute_fp8_quant(x, route_to_row, scale, *, wave=32):
    m, k, topk = permute_spec.sizes(x, route_to_row, scale)
    rows = empty(x, (m * topk, k), torch.float8_e4m3fn)
    if m == 0:
        return rows
    stride, unit = in_units(x, m)
    index = x.get_device()
    pdl = m * k <= _PDL_ELEMENTS and has_pdl(index)
    chunks, launch = _permute_launch(k, topk, unit, pdl, wave)
    target = rows if rounds(index, rows.dtype, wave) else rows.view(torch.uint8)
    launch(m * chunks, x, route_to_row, scale, target, stride, route_to_row.stride(0))
    return rows


def _silu_blocks(n):
    block_n, chunks = _blocks(n, _SILU_TILE)
    return _SILU_TILE // block_n, block_n, chunks


@functools.cache
def _silu_launch(n, unit, pdl, wave):
    block_rows, block_n, chunks = _silu_blocks(n)
    return (block_rows, chunks), Launch(
        silu_kernel,
        num_warps=128 // wave,
        pdl=pdl,
        N=n,
        UNIT=unit,
        BLOCK_ROWS=block_rows,
        BLOCK_N=block_n,
    )


def silu_mul_fp8_quant(rows, scale, expert_offsets, *, wave=32):
    m, n, num_experts = silu_spec.sizes(rows, scale, expert_offsets)
    q = empty(rows, (m, n), torch.float8_e4m3fn)
    if m == 0:
        return q
    stride, unit = in_units(rows, m)
    index = rows.get_device()
    pdl = m * n <= 2 * _PDL_ELEMENTS and has_pdl(index)
    (block_rows, chunks), launch = _silu_launch(n, unit, pdl, wave)
    programs = min(_MAX_PROGRAMS, -(-m // block_rows) * chunks)
    target = q if rounds(index, q.dtype, wave) else q.view(torch.uint8)
    launch(programs, rows, scale, expert_offsets, target, num_experts, stride)
    return q


@functools.cache
def _silu_amax_launch(n, unit, pdl, wave):
    block_rows, block_n, chunks = _silu_blocks(n)
    return (block_rows, chunks), Launch(
        silu_amax_kernel,
        num_warps=128 // wave,
        pdl=pdl,
        N=n,
        UNIT=unit,
        BLOCK_ROWS=block_rows,
        BLOCK_N=block_n,
    )


def silu_mul_scale(rows, expert_offsets, *, wave=32):
    """Return ``[1]`` float32: the scale that makes the largest gated activation in use QMAX.

    Args:
        rows: ``[M, 2N]``, as `silu_mul_fp8_quant` takes it; not empty.
        expert_offsets: ``[E + 1]`` int32.
        wave: threads of a warp.
    """
    m, width = rows.shape
    stride, unit = in_units(rows, m)
    pdl = has_pdl(rows.get_device())
    (block_rows, chunks), launch = _silu_amax_launch(width // 2, unit, pdl, wave)
    programs = min(_MAX_PROGRAMS, -(-m // block_rows) * chunks)
    partial = empty(rows, (programs,), torch.int32)
    launch(programs, rows, expert_offsets, partial, expert_offsets.shape[0] - 1, stride)
    scale = empty(rows, (1,), torch.float32)
    _scale_launch(pdl, wave)(1, partial, scale, programs)
    return scale


@functools.cache
def _reduce_launch(k, topk, unit, pdl):
    block_k, chunks = _blocks(k, _REDUCE_BLOCK)
    return chunks, Launch(
        reduce_kernel,
        num_warps=max(1, block_k // 512),  # the rows of 8 routes must fit registers
        pdl=pdl,
        K=k,
        TOPK=topk,
        UNIT=unit,
        BLOCK_K=block_k,
        SLOTS=min(8, triton.next_power_of_2(topk)),
    )


def moe_unpermute_reduce(rows, route_to_row, topk_weights, *, routed_scaling_factor=1.0):
    m, k, topk = reduce_spec.sizes(
        rows, route_to_row, topk_weights, routed_scaling_factor=routed_scaling_factor
    )
    out = empty(rows, (m, k), rows.dtype)
    if m == 0:
        return out
    stride, unit = in_units(rows, rows.shape[0])
    pdl = m * k <= _PDL_ELEMENTS and has_pdl(rows.get_device())
    chunks, launch = _reduce_launch(k, topk, unit, pdl)
    launch(
        m * chunks,
        rows,
        route_to_row,
        topk_weights,
        out,
        float(routed_scaling_factor),
        stride,
        route_to_row.stride(0),
        topk_weights.stride(0),
    )
    return out

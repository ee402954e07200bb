"""w4a8_grouped_gemm in Triton, for weights as checkpoints store them.

The weight is the left operand of the tensor cores and tokens are the right one, because an expert
has many weight rows and often few tokens.  A program makes a tile of BLOCK_N weight rows by BLOCK_M
tokens of one expert; which expert, it finds in the offsets, so that the host need not know them.

Low and high nibbles are even and odd columns.  They stay apart: the sum over a group is that over
its even columns plus that over its odd ones, and the activations are split likewise.  Both operands
are exact, on devices that multiply fp8 as e4m3: its codes 0 to 15 are the numbers 0 to 15 in units
of 2**-9, so the code of a nibble is its magnitude and its sign.  Elsewhere both become float16.
"""

import functools

import torch
import triton
import triton.language as tl

from hwfuse.ops import w4a8_grouped_gemm as spec
from hwfuse_triton._fp8 import rounds
from hwfuse_triton._launch import Launch, empty, has_pdl
from hwfuse_triton.moe_rows import in_units, wait

# Rows per expert beyond which a tile has so many tokens: padding costs time of the tensor cores.
# Under expert parallelism the host knows only an upper bound of the rows, often 8 times too high.
ROWS_FOR_32 = 8
ROWS_FOR_64 = 64
ROWS_FOR_128 = 512
FEW_ROWS = 128  # up to here too few programs to hide latency: each loads further ahead
_PDL_PROGRAMS = 2048
_MAGNITUDE = tl.constexpr(512.0)  # fp8 weights are in units of 2**-9

# Four bytes at a time, which elementwise code on bytes is not compiled to: of c its sign s, and
# where that is set 16 - c, as (c ^ 15) + 1, with the sign in bit 7.
_NIBBLES_TO_E4M3 = """{
.reg .b32 c, s, one, ones;
%s
and.b32 c, c, 0x0f0f0f0f;
and.b32 s, c, 0x08080808;
shr.b32 one, s, 3;
shl.b32 ones, s, 1;
sub.u32 ones, ones, one;
xor.b32 c, c, ones;
add.u32 c, c, one;
shl.b32 s, s, 4;
or.b32 $0, c, s;
}"""
_LOW = tl.constexpr(_NIBBLES_TO_E4M3 % "mov.b32 c, $1;")
_HIGH = tl.constexpr(_NIBBLES_TO_E4M3 % "shr.b32 c, $1, 4;")


@triton.jit
def _in_words(packed, CODE: tl.constexpr):
    codes = tl.inline_asm_elementwise(CODE, "=r,r", [packed], tl.int8, is_pure=True, pack=4)
    return codes.to(tl.float8e4nv, bitcast=True)


@triton.jit
def _in_bytes(nibble):
    code = tl.where(nibble >= 8, (16 - nibble) | 0x80, nibble)
    return code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)


@triton.jit
def _float16_of(nibble):
    """Return float16 of numbers in two's complement, 0 to 15: 1032 less than 1024 + (w + 8)."""
    return (nibble ^ 0x6408).to(tl.float16, bitcast=True) - 1032.0


@triton.jit
def _weights(packed, IS_FP8: tl.constexpr, HAS_PTX: tl.constexpr):
    """Return the even and the odd elements of int8 bytes."""
    if IS_FP8 and HAS_PTX:
        even, odd = _in_words(packed, _LOW), _in_words(packed, _HIGH)
    else:
        low, high = packed.to(tl.int16) & 15, (packed >> 4).to(tl.int16) & 15
        if IS_FP8:
            even, odd = _in_bytes(low), _in_bytes(high)
        else:
            even, odd = _float16_of(low), _float16_of(high)
    return even, odd


@triton.jit
def _activations(a, BLOCK_M: tl.constexpr, IS_FP8: tl.constexpr):
    """Return the even and the odd columns of a tile: fp8, or bytes as exact float16."""
    if not IS_FP8:
        code = a.to(tl.int16)
        # As bits of float16 a code is its number times 2**-8, subnormal ones too; not so NaN.
        bits = tl.where((code & 0x7F) == 0x7F, 0x7E00, (code & 0x7F) << 7) | ((code & 0x80) << 8)
        a = bits.to(tl.float16, bitcast=True) * 256.0
    even, odd = tl.split(tl.reshape(a, (BLOCK_M, 64, 2)))
    return even, odd


@triton.jit
def _columns(scales, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr):
    """Return the GROUPS columns of a tile as a tuple."""
    if GROUPS == 4:
        even, odd = tl.split(tl.reshape(scales, (BLOCK_N, 2, 2)))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        columns = first, second, third, fourth
    elif GROUPS == 2:
        columns = tl.split(scales)
    else:
        columns = (tl.reshape(scales, (BLOCK_N,)),)
    return columns


@triton.jit
def _find_tile(
    offsets_ptr,
    tile,
    num_experts,
    BLOCK_M: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BY_ROW: tl.constexpr,
):
    """Return expert, first row and end of the expert's rows; no rows if the tile is empty.

    By row, tile t is that which begins at row t, if one does.  Otherwise the tiles of expert e are
    numbered from offset[e] // BLOCK_M + e: at least as many numbers as it can have tiles.
    """
    expert = tl.arange(0, BLOCK_EXPERTS)
    is_expert = expert < num_experts
    ends = tl.load(offsets_ptr + expert + 1, mask=is_expert, other=0)
    passed = ends if BY_ROW else ends // BLOCK_M + expert + 1
    e = tl.sum((is_expert & (passed <= tile)).to(tl.int32), axis=0)
    start = tl.load(offsets_ptr + e, mask=e < num_experts, other=0)
    end = tl.load(offsets_ptr + e + 1, mask=e < num_experts, other=0)
    if BY_ROW:
        first = tl.where((tile - start) % BLOCK_M == 0, tile, end)
    else:
        first = start + (tile - (start // BLOCK_M + e)) * BLOCK_M
    return e, first, end


@triton.jit(
    do_not_specialize=[
        "num_experts", "a_stride", "b_expert_stride", "b_stride", "s_expert_stride", "s_stride"
    ]
)  # fmt: skip
def w4a8_grouped_gemm_kernel(
    a_ptr,
    a_scale_ptr,
    b_ptr,
    s_ptr,
    offsets_ptr,
    rows_ptr,
    num_experts,
    a_stride,  # these in A_UNIT, B_UNIT and S_UNIT elements
    b_expert_stride,
    b_stride,
    s_expert_stride,
    s_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    INTERLEAVE: tl.constexpr,
    A_UNIT: tl.constexpr,
    B_UNIT: tl.constexpr,
    S_UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BY_ROW: tl.constexpr,
    GROUPS: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_PTX: tl.constexpr,
    PDL: tl.constexpr,
):
    wait(PDL)
    NUM_GROUPS: tl.constexpr = K // 128
    ROW_BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    STEPS: tl.constexpr = (NUM_GROUPS + GROUPS - 1) // GROUPS
    IS_FP8: tl.constexpr = a_ptr.dtype.element_ty == tl.float8e4nv
    e, first, end = _find_tile(
        offsets_ptr, tl.program_id(0) // ROW_BLOCKS, num_experts, BLOCK_M, BLOCK_EXPERTS, BY_ROW
    )
    if first < end:
        row = first + tl.arange(0, BLOCK_M)
        is_row = (row < end)[:, None]
        n = tl.program_id(0) % ROW_BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
        is_n = (n < N)[:, None]
        column = tl.arange(0, 128)[None, :]
        byte = tl.arange(0, 64)[None, :]
        group = tl.arange(0, GROUPS)[None, :]
        a_tile = a_ptr + row.to(tl.int64)[:, None] * a_stride * A_UNIT + column
        b_tile = b_ptr + e.to(tl.int64) * b_expert_stride * B_UNIT
        b_tile = b_tile + n.to(tl.int64)[:, None] * b_stride * B_UNIT + byte
        pitch = s_stride.to(tl.int64) * S_UNIT
        s_tile = s_ptr + e.to(tl.int64) * s_expert_stride * S_UNIT + n[:, None] * INTERLEAVE
        s_tile = s_tile + (group if INTERLEAVE == 4 else group * pitch)

        total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        # Scales are loaded one step ahead: Triton's own pipelining is for what a dot reads.
        ahead = tl.load(s_tile, mask=is_n & (group < NUM_GROUPS), other=0.0)
        for step in tl.range(0, STEPS, num_stages=STAGES):
            scales = _columns(ahead.to(tl.float32), BLOCK_N, GROUPS)
            g = (step + 1) * GROUPS
            at = g // INTERLEAVE * pitch + g % INTERLEAVE
            ahead = tl.load(s_tile + at, mask=is_n & (group < NUM_GROUPS - g), other=0.0)
            for i in tl.static_range(0, GROUPS):
                g = step * GROUPS + i
                is_a, is_b = is_row, is_n
                if NUM_GROUPS % GROUPS:
                    is_a, is_b = is_row & (g < NUM_GROUPS), is_n & (g < NUM_GROUPS)
                if IS_FP8:
                    a = tl.load(a_tile + g * 128, mask=is_a, other=0.0)
                else:
                    a = tl.load(a_tile + g * 128, mask=is_a, other=0)
                if N % BLOCK_N == 0 and NUM_GROUPS % GROUPS == 0:
                    packed = tl.load(b_tile + g * 64)
                else:
                    packed = tl.load(b_tile + g * 64, mask=is_b, other=0)
                even, odd = _activations(a, BLOCK_M, IS_FP8)
                low, high = _weights(packed, IS_FP8, HAS_PTX)
                part = tl.dot(low, tl.trans(even))
                part = tl.dot(high, tl.trans(odd), part)
                total += part * scales[i][:, None]
        factor = tl.load(a_scale_ptr) * (_MAGNITUDE if IS_FP8 else 1.0)
        result = tl.trans((total * factor).to(tl.bfloat16))
        to = rows_ptr + row.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(to, result, mask=is_row & (n < N)[None, :])


def _tile(m, num_experts, has_room):
    """Return BLOCK_N, BLOCK_M, warps, stages and groups per step."""
    if m > ROWS_FOR_64 * num_experts:
        if not has_room:
            return 64, 64, 8, 2, 1
        return (128, 128, 8, 4, 2) if m > ROWS_FOR_128 * num_experts else (128, 64, 8, 4, 2)
    if m > ROWS_FOR_32 * num_experts:
        return (128, 32, 4, 3, 2) if has_room else (64, 32, 4, 2, 1)
    if not has_room:
        return 64, 16, 4, 2, 2
    return 64, 16, 4, 3, 4 if m <= FEW_ROWS else 2


@functools.cache
def _launch(n, k, interleave, units, tile, block_experts, by_row, has_ptx, pdl, wave):
    block_n, block_m, num_warps, stages, groups = tile
    a_unit, b_unit, s_unit = units
    return Launch(
        w4a8_grouped_gemm_kernel,
        num_warps=num_warps * 32 // wave,
        pdl=pdl,
        N=n,
        K=k,
        INTERLEAVE=interleave,
        A_UNIT=a_unit,
        B_UNIT=b_unit,
        S_UNIT=s_unit,
        BLOCK_N=block_n,
        BLOCK_M=block_m,
        BLOCK_EXPERTS=block_experts,
        BY_ROW=by_row,
        GROUPS=min(groups, triton.next_power_of_2(k // spec.GROUP)),
        STAGES=stages,
        HAS_PTX=has_ptx,
    )


@functools.cache
def _has_room(index):
    """Say whether device *index* has the shared memory of Hopper; the CPU, -1, counts as one."""
    if index < 0:
        return True
    room: int = torch.cuda.get_device_properties(index).shared_memory_per_block_optin
    return room >= 160 * 1024


def _strides(b, unit):
    """Return the strides of experts and rows in units, and the unit: 1 where rows lie oddly."""
    expert_stride = b.stride(0) if b.shape[0] > 1 else 0
    stride = b.stride(1) if b.shape[1] > 1 else 0
    if expert_stride % unit or stride % unit:
        return expert_stride, stride, 1
    return expert_stride // unit, stride // unit, unit


def w4a8_grouped_gemm(a, a_scale, b, b_scale, expert_offsets, *, wave=32):
    m, n, k, num_experts, interleave = spec.sizes(a, a_scale, b, b_scale, expert_offsets)
    rows = empty(a, (m, n), torch.bfloat16)
    if m == 0:
        return rows
    index = a.get_device()
    # AMD's devices that multiply fp8 would convert bytes one by one, at more than that saves.
    is_fp8 = wave == 32 and rounds(index, a.dtype, wave)
    tile = _tile(m, num_experts, is_fp8 and _has_room(index))
    block_n, block_m = tile[0], tile[1]
    tiles = m // block_m + num_experts
    by_row = m <= tiles
    programs = min(m, tiles) * -(-n // block_n)
    a_stride, a_unit = in_units(a, m)
    b_expert_stride, b_stride, b_unit = _strides(b, 16)
    s_expert_stride, s_stride, s_unit = _strides(b_scale, 4)
    units = a_unit, b_unit, s_unit
    block_experts = triton.next_power_of_2(num_experts)
    pdl = programs <= _PDL_PROGRAMS and has_pdl(index)
    _launch(n, k, interleave, units, tile, block_experts, by_row, is_fp8 and index >= 0, pdl, wave)(
        programs,
        a if is_fp8 else a.view(torch.uint8),
        a_scale,
        b,
        b_scale,
        expert_offsets,
        rows,
        num_experts,
        a_stride,
        b_expert_stride,
        b_stride,
        s_expert_stride,
        s_stride,
    )
    return rows

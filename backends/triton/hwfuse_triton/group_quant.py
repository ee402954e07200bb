"""fp8_group_quant, flatten_fp8_group_quant and silu_mul_fp8_group_quant in Triton: one kernel.

The groups of all rows are numbered through, and a program takes BLOCK successive ones: a tile may
span rows, so that short rows still fill a program.
"""

import functools

import torch
import triton
import triton.language as tl

from hwfuse import InputError, fp8_dtype
from hwfuse.ops import flatten_fp8_group_quant as flatten_spec
from hwfuse.ops import fp8_group_quant as spec
from hwfuse.ops import silu_mul_fp8_group_quant as silu_spec
from hwfuse_triton import _fp8, long_rows
from hwfuse_triton._fp8 import largest_bits, scales, store_codes, store_scales
from hwfuse_triton._launch import Launch, empty, has_pdl

# Elements per program, and threads: 16 elements each, which are one 16-byte store.  Smaller tiles
# are 0.2 us faster up to 16,384 groups, but with dependent launch a program costs 1.2 ns.
_TILE, _THREADS = 2048, 128
_MOST_GROUPS = 2**31 - 2**20  # over all rows: they are numbered in 32 bits


@triton.jit(do_not_specialize=["num_rows", "row_stride", "head_stride", "pitch"])
def group_quant_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    num_rows,
    row_stride,  # in UNIT elements, as head_stride: a factor in the code proves the alignment
    head_stride,
    pitch,
    NUM_GROUPS: tl.constexpr,
    HEAD_GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    MODE: tl.constexpr,
    BY_ROW: tl.constexpr,
    FORMAT: tl.constexpr,
    QMAX: tl.constexpr,
    CLAMP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Quantise the groups of one tile; silu: of silu(x) times what lies a row of q further."""
    K: tl.constexpr = NUM_GROUPS * GROUP_SIZE
    PACKED: tl.constexpr = FORMAT == "ue8m0_packed"
    PER_ROW: tl.constexpr = (NUM_GROUPS + 3) // 4 * 4 if PACKED else NUM_GROUPS
    item = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inner = tl.arange(0, BLOCK_SIZE)[None, :]
    row = (item // PER_ROW).to(tl.int64)
    group = item % PER_ROW
    at = row * (row_stride.to(tl.int64) * UNIT) + group % HEAD_GROUPS * GROUP_SIZE
    if HEAD_GROUPS != NUM_GROUPS:
        at += group // HEAD_GROUPS * (head_stride.to(tl.int64) * UNIT)
    at = at[:, None] + inner
    to = (row * K + group * GROUP_SIZE)[:, None] + inner
    is_item = item < num_rows * PER_ROW
    mask = is_item[:, None]
    if PER_ROW != NUM_GROUPS:
        mask = mask & (group < NUM_GROUPS)[:, None]
    if BLOCK_SIZE != GROUP_SIZE:
        mask = mask & (inner < GROUP_SIZE)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    y = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if MODE == "silu":
        up = tl.load(x_ptr + K + at, mask=mask, other=0.0).to(tl.float32)
        y = y / (1.0 + tl.exp(-y)) * up
    # Numbers of few bits often lie in the middle between two codes: there every bit decides.
    scale, inverse = scales(largest_bits(y), QMAX, FORMAT != "fp32", EXACT=True)
    store_codes(q_ptr, to, y * inverse[:, None], mask, QMAX, CLAMP)
    store_scales(scale_ptr, scale, row, group, is_item, pitch, NUM_GROUPS, BY_ROW, PACKED)


@functools.cache
def _launch(
    num_groups, head_groups, group_size, unit, mode, by_row, scale_format, dtype, wave, rounds, pdl
):
    """Return the launch and the number of groups that its programs take each."""
    block_size = triton.next_power_of_2(group_size)
    block = max(1, _TILE // block_size)
    threads = min(block_size // 16, 512) if block_size > _TILE else _THREADS
    launch = Launch(
        group_quant_kernel,
        num_warps=threads // wave,
        pdl=pdl,
        # Without it ptxas saves registers by loading the last of x when the first is used up.
        options={"maxnreg": 128} if mode == "silu" and wave == 32 else None,
        NUM_GROUPS=num_groups,
        HEAD_GROUPS=head_groups,
        GROUP_SIZE=group_size,
        UNIT=unit,
        MODE=mode,
        BY_ROW=by_row,
        FORMAT=scale_format,
        QMAX=torch.finfo(dtype).max,
        CLAMP=wave == 64 or not rounds,
        BLOCK=block,
        BLOCK_SIZE=block_size,
    )
    return launch, block


def _quantise(
    x, m, num_groups, head_groups, head_stride, mode, group_size, scale_layout, scale_format,
    dtype, wave,
):  # fmt: skip
    """Allocate q and its scale, and write them.  *head_groups*: groups side by side in x."""
    dtype = dtype or fp8_dtype(x.device)  # the op's own call has resolved None
    q = empty(x, (m, num_groups * group_size), dtype)
    scale, pitch = _fp8.empty_scale(x, m, num_groups, scale_layout, scale_format)
    if m == 0:
        return q, scale
    index, vector = x.get_device(), 16 // x.element_size()
    # One row's stride may be any number: it must not choose the slow variant, nor exceed 32 bits.
    row_stride = x.stride(0) if m > 1 else 0
    unit = 1 if (row_stride | head_stride) % vector else vector
    rounds = _fp8.rounds(index, dtype, wave)
    target = q if rounds else q.view(torch.uint8)
    constants = (
        num_groups, head_groups, group_size, unit, mode, scale_layout == "row",
        scale_format, dtype, wave, rounds, has_pdl(index),
    )  # fmt: skip
    row_stride, head_stride = row_stride // unit, head_stride // unit
    if group_size > long_rows.LONGEST:
        launch = long_rows.launch(*constants)
        launch(m, x, x, x, target, scale, x, x, m, row_stride, head_stride, pitch, 0.0)
        return q, scale
    launch, block = _launch(*constants)
    items = m * ((num_groups + 3) // 4 * 4 if scale_format == "ue8m0_packed" else num_groups)
    if items > _MOST_GROUPS:
        raise InputError("x.shape[0]", m, f"at most {_MOST_GROUPS // (items // m)} rows")
    launch(-(-items // block), x, target, scale, m, row_stride, head_stride, pitch)
    return q, scale


def fp8_group_quant(
    x, *, group_size=128, scale_layout="row", scale_format="fp32", dtype=None, wave=32
):
    m, _, num_groups = spec.sizes(
        x,
        group_size=group_size,
        scale_layout=scale_layout,
        scale_format=scale_format,
        dtype=dtype,
    )
    return _quantise(
        x, m, num_groups, num_groups, 0, "", group_size, scale_layout, scale_format, dtype, wave
    )


def flatten_fp8_group_quant(
    x, *, group_size=128, scale_layout="row", scale_format="fp32", dtype=None, wave=32
):
    m, num_heads, head_dim, _, num_groups = flatten_spec.sizes(
        x,
        group_size=group_size,
        scale_layout=scale_layout,
        scale_format=scale_format,
        dtype=dtype,
    )
    return _quantise(
        x, m, num_groups, head_dim // group_size, x.stride(1) if num_heads > 1 else 0, "",
        group_size, scale_layout, scale_format, dtype, wave,
    )  # fmt: skip


def silu_mul_fp8_group_quant(
    x, *, group_size=128, scale_layout="row", scale_format="fp32", dtype=None, wave=32
):
    m, _, num_groups = silu_spec.sizes(
        x,
        group_size=group_size,
        scale_layout=scale_layout,
        scale_format=scale_format,
        dtype=dtype,
    )
    return _quantise(
        x, m, num_groups, num_groups, 0, "silu", group_size, scale_layout, scale_format, dtype, wave
    )

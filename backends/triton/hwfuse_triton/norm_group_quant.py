"""RMSNorm and fp8 quantisation in one kernel: the four ops rms_norm_…fp8_group_quant.

A row is read once and stays in the registers of one program; rows too long for that go to
long_rows.py.  Short rows share a program.
"""

import functools

import torch
import triton
import triton.language as tl

from hwfuse import fp8_dtype
from hwfuse.ops import add_rms_norm_and_fp8_group_quant as add_and_spec
from hwfuse.ops import add_rms_norm_fp8_group_quant as add_spec
from hwfuse.ops import rms_norm_and_fp8_group_quant as and_spec
from hwfuse.ops import rms_norm_fp8_group_quant as spec
from hwfuse_triton import _fp8, long_rows
from hwfuse_triton._fp8 import largest_bits, scales, store_codes, store_scales
from hwfuse_triton._launch import Launch, empty, has_pdl

# Up to here rows are spread over many warps, which end sooner; beyond, the device is full, and
# fewer warps leave more programs room.  Not tried on AMD, which keeps the many.
FEW_ELEMENTS = 2**23


@triton.jit(do_not_specialize=["num_rows", "x_stride", "residual_stride", "pitch", "eps"])
def norm_group_quant_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    q_ptr,
    scale_ptr,
    residual_out_ptr,
    norm_ptr,
    num_rows,
    x_stride,  # in UNIT elements, as residual_stride: a factor in the code proves the alignment
    residual_stride,
    pitch,
    eps,
    NUM_GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    ADD: tl.constexpr,
    NORM: tl.constexpr,
    BY_ROW: tl.constexpr,
    FORMAT: tl.constexpr,
    QMAX: tl.constexpr,
    CLAMP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    VECTOR: tl.constexpr,  # elements that a thread loads at once: 16 bytes
    PDL: tl.constexpr,
):
    K: tl.constexpr = NUM_GROUPS * GROUP_SIZE
    PACKED: tl.constexpr = FORMAT == "ue8m0_packed"
    PER_ROW: tl.constexpr = (NUM_GROUPS + 3) // 4 * 4 if PACKED else NUM_GROUPS
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    group = tl.arange(0, BLOCK_GROUPS)
    inner = tl.arange(0, BLOCK_SIZE)
    column = (group[:, None] * GROUP_SIZE + inner[None, :])[None, :, :]
    x_at = (row * (x_stride.to(tl.int64) * UNIT))[:, None, None] + column
    residual_at = (row * (residual_stride.to(tl.int64) * UNIT))[:, None, None] + column
    to = (row * K)[:, None, None] + column
    is_row = row < num_rows
    is_column = ((group[:, None] < NUM_GROUPS) & (inner[None, :] < GROUP_SIZE))[None, :, :]
    mask = is_row[:, None, None] & is_column

    # No kernel writes the weight, so it is fetched before the wait; in the shape of the rows, whose
    # distribution over the threads it then has.
    weight_at = tl.broadcast_to(column, (ROWS, BLOCK_GROUPS, BLOCK_SIZE))
    weight = tl.load(weight_ptr + weight_at, mask=is_column, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    t = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        t += tl.load(residual_ptr + residual_at, mask=mask, other=0.0).to(tl.float32)
        tl.store(residual_out_ptr + to, t.to(residual_out_ptr.dtype.element_ty), mask=mask)

    # The largest of a group is taken of t * w, while the sum of the row is still under way.
    y = t * weight.to(tl.float32)
    largest = largest_bits(y).to(tl.float32, bitcast=True)
    if ROWS == 1:
        # In any order, and as a tensor: a scalar would keep the compiler from bringing the largest
        # numbers to the threads that store the scales before the sum is known.
        squares = tl.sum(tl.reshape(t * t, (1, BLOCK_GROUPS * BLOCK_SIZE), can_reorder=True), 1)
    else:
        squares = tl.sum(tl.sum(t * t, 2), 1)
    r = tl.rsqrt(squares * (1.0 / K) + eps)[:, None]
    bits = (largest * r).to(tl.int32, bitcast=True)
    scale, inverse = scales(bits, QMAX, FORMAT != "fp32", EXACT=False)
    if NORM:
        norm = y * r[:, :, None]
        tl.store(norm_ptr + to, norm.to(norm_ptr.dtype.element_ty), mask=mask)
    # Were it known that more lies side by side, all stores would pass through shared memory.
    to = tl.max_contiguous(to, [1, 1, VECTOR])
    store_codes(q_ptr, to, y * (inverse * r)[:, :, None], mask, QMAX, CLAMP)
    store_scales(
        scale_ptr, scale, row[:, None], group[None, :],
        is_row[:, None] & (group < PER_ROW)[None, :], pitch, NUM_GROUPS, BY_ROW, PACKED,
    )  # fmt: skip


def _warps(k, *, is_few):
    """Return the warps of 32 threads that a row of k elements has, at most 64 elements a thread."""
    if k <= 3584:
        return 4
    warps = max(4, triton.next_power_of_2(-(-k // 1792)))
    return min(16, 2 * warps if is_few else warps)


@functools.cache
def _launch(
    num_groups, group_size, unit, add, is_few, itemsize, by_row, scale_format, dtype, wave, rounds,
    pdl, *, norm,
):  # fmt: skip
    """Return the launch and the number of rows that its programs take each."""
    k = num_groups * group_size
    block_size, vector = triton.next_power_of_2(group_size), 16 // itemsize
    # A packed scale has bytes up to the next multiple of 4 groups.
    fewest = 4 if scale_format == "ue8m0_packed" else 1
    block_groups = max(triton.next_power_of_2(num_groups), fewest)
    width = block_groups * block_size
    rows = max(1, 2048 // width)
    launch = Launch(
        norm_group_quant_kernel,
        num_warps=_warps(k, is_few=is_few) * 32 // wave,
        pdl=pdl,
        # Left alone, ptxas spills rather than give the rounding in software more than 128.
        options=None if rounds or is_few else {"maxnreg": 255},
        NUM_GROUPS=num_groups,
        GROUP_SIZE=group_size,
        UNIT=unit,
        ADD=add,
        NORM=norm,
        BY_ROW=by_row,
        FORMAT=scale_format,
        QMAX=torch.finfo(dtype).max,
        CLAMP=wave == 64 or not rounds,
        ROWS=rows,
        BLOCK_GROUPS=block_groups,
        BLOCK_SIZE=block_size,
        VECTOR=vector,
    )
    return launch, rows


def _run(x, residual, weight, sizes, eps, group_size, options, wave, *, norm):
    """Return q, scale, the sum if there is a *residual*, and the norm if *norm* says so."""
    m, k, num_groups = sizes
    scale_layout, scale_format, dtype = options
    dtype = dtype or fp8_dtype(x.device)  # the op's own call has resolved None
    x_dtype, add = x.dtype, residual is not None
    q = empty(x, (m, k), dtype)
    scale, pitch = _fp8.empty_scale(x, m, num_groups, scale_layout, scale_format)
    outputs = (q, scale)
    if add:
        outputs += (empty(x, (m, k), x_dtype),)
    if norm:
        outputs += (empty(x, (m, k), x_dtype),)
    if m == 0:
        return outputs
    index, itemsize = x.get_device(), x_dtype.itemsize
    # One row's stride may be any number: it must not choose the slow variant, nor exceed 32 bits.
    x_stride = x.stride(0) if m > 1 else 0
    residual_stride = residual.stride(0) if add and m > 1 else 0
    unit = 1 if (x_stride | residual_stride) % (16 // itemsize) else 16 // itemsize
    rounds = _fp8.rounds(index, dtype, wave)
    arguments = (
        x, residual if add else x, weight, q if rounds else q.view(torch.uint8), scale,
        outputs[2] if add else x, outputs[-1] if norm else x,
        m, x_stride // unit, residual_stride // unit, pitch, eps,
    )  # fmt: skip
    shape = num_groups, group_size, unit
    more = scale_layout == "row", scale_format, dtype, wave, rounds, has_pdl(index)
    if k > long_rows.LONGEST:
        mode = "add norm" if add else "norm"
        long_rows.launch(num_groups, *shape, mode, *more, norm=norm)(m, *arguments)
        return outputs
    launch, rows = _launch(
        *shape, add, wave == 64 or m * k <= FEW_ELEMENTS, itemsize, *more, norm=norm
    )
    launch(-(-m // rows), *arguments)
    return outputs


def rms_norm_fp8_group_quant(
    x, weight, *, eps=1e-6, group_size=128, scale_layout="row", scale_format="fp32", dtype=None,
    wave=32,
):  # fmt: skip
    sizes = spec.sizes(
        x,
        weight,
        eps=eps,
        group_size=group_size,
        scale_layout=scale_layout,
        scale_format=scale_format,
        dtype=dtype,
    )
    options = scale_layout, scale_format, dtype
    return _run(x, None, weight, sizes, eps, group_size, options, wave, norm=False)


def rms_norm_and_fp8_group_quant(
    x, weight, *, eps=1e-6, group_size=128, scale_layout="row", scale_format="fp32", dtype=None,
    wave=32,
):  # fmt: skip
    sizes = and_spec.sizes(
        x,
        weight,
        eps=eps,
        group_size=group_size,
        scale_layout=scale_layout,
        scale_format=scale_format,
        dtype=dtype,
    )
    options = scale_layout, scale_format, dtype
    return _run(x, None, weight, sizes, eps, group_size, options, wave, norm=True)


def add_rms_norm_fp8_group_quant(
    x, residual, weight, *, eps=1e-6, group_size=128, scale_layout="row", scale_format="fp32",
    dtype=None, wave=32,
):  # fmt: skip
    sizes = add_spec.sizes(
        x,
        residual,
        weight,
        eps=eps,
        group_size=group_size,
        scale_layout=scale_layout,
        scale_format=scale_format,
        dtype=dtype,
    )
    options = scale_layout, scale_format, dtype
    return _run(x, residual, weight, sizes, eps, group_size, options, wave, norm=False)


def add_rms_norm_and_fp8_group_quant(
    x, residual, weight, *, eps=1e-6, group_size=128, scale_layout="row", scale_format="fp32",
    dtype=None, wave=32,
):  # fmt: skip
    sizes = add_and_spec.sizes(
        x,
        residual,
        weight,
        eps=eps,
        group_size=group_size,
        scale_layout=scale_layout,
        scale_format=scale_format,
        dtype=dtype,
    )
    options = scale_layout, scale_format, dtype
    return _run(x, residual, weight, sizes, eps, group_size, options, wave, norm=True)

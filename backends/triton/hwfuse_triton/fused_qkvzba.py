"""fused_qkvzba in Triton: one kernel for both layouts, any head counts and widths.

The heads of all rows are numbered through, section by section (q, k, v, z), and a program copies
BLOCK_HEADS successive ones: a tile may span rows, so that few heads per row still fill a program.
Programs of one row block lie side by side: what they read is one piece of memory.
"""

import functools

import triton
import triton.language as tl

from hwfuse import InputError
from hwfuse.ops import fused_qkvzba as spec
from hwfuse_triton._launch import Launch, empty, has_pdl

# Elements per program: with 128 threads and 2-byte elements, two 16-byte loads in flight each.
_TILE = 2048
_WARPS = 4
_LOGITS = 512
# Programmatic dependent launch saves 0.3-0.8 us on an H200 up to here (512 tokens of any shape);
# with many more programs the early start of the next kernel only takes their place on the device.
_PDL_PROGRAMS = 8192
_MAX_HEADS = 2**31 - 2**20  # of a section, over all rows: they are numbered in 32 bits


@triton.jit
def _copy_heads(
    source_ptr,
    source_stride,
    target_ptr,
    target_stride,
    first,
    count,
    HEADS: tl.constexpr,
    PER_RECORD: tl.constexpr,
    RECORD: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Copy heads *first*... of *count*; PER_RECORD of them lie together in a record of the row."""
    item = first + tl.arange(0, BLOCK_HEADS)
    row = item // HEADS
    head = item % HEADS
    at = row.to(tl.int64) * source_stride
    at += (head // PER_RECORD) * RECORD + (head % PER_RECORD) * WIDTH
    to = row.to(tl.int64) * target_stride + head * WIDTH
    column = tl.arange(0, BLOCK_WIDTH)
    mask = (item < count)[:, None]
    if BLOCK_WIDTH != WIDTH:
        mask = mask & (column < WIDTH)[None, :]
    value = tl.load(source_ptr + at[:, None] + column[None, :], mask=mask)
    tl.store(target_ptr + to[:, None] + column[None, :], value, mask=mask)


@triton.jit
def _copy_logits(
    ba_ptr,
    ba_stride,
    b_ptr,
    a_ptr,
    first,
    count,
    HEADS: tl.constexpr,
    PER_RECORD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy b and a of BLOCK heads; a record of the row is PER_RECORD b, then PER_RECORD a."""
    item = first + tl.arange(0, BLOCK)
    head = item % HEADS
    at = (item // HEADS).to(tl.int64) * ba_stride
    at += (head // PER_RECORD) * (2 * PER_RECORD) + head % PER_RECORD
    mask = item < count
    b_value = tl.load(ba_ptr + at, mask=mask)
    a_value = tl.load(ba_ptr + at + PER_RECORD, mask=mask)
    tl.store(b_ptr + item, b_value, mask=mask)
    tl.store(a_ptr + item, a_value, mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "qkvz_stride", "ba_stride"])
def fused_qkvzba_kernel(
    qkvz_ptr,
    ba_ptr,
    mixed_qkv_ptr,
    z_ptr,
    b_ptr,
    a_ptr,
    num_tokens,
    qkvz_stride,  # in STRIDE_UNIT elements: a factor in the code proves the alignment of rows
    ba_stride,
    NUM_K_HEADS: tl.constexpr,
    NUM_V_HEADS: tl.constexpr,
    HEAD_K_DIM: tl.constexpr,
    HEAD_V_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_K_DIM: tl.constexpr,
    BLOCK_V_DIM: tl.constexpr,
    BLOCK_LOGITS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    R: tl.constexpr = NUM_V_HEADS // NUM_K_HEADS
    K_SIZE: tl.constexpr = NUM_K_HEADS * HEAD_K_DIM
    V_SIZE: tl.constexpr = NUM_V_HEADS * HEAD_V_DIM
    # An interleaved row holds one record per key head, a contiguous one is a single record.
    RECORDS: tl.constexpr = NUM_K_HEADS if INTERLEAVED else 1
    RECORD: tl.constexpr = (2 * K_SIZE + 2 * V_SIZE) // RECORDS
    K_PER_RECORD: tl.constexpr = NUM_K_HEADS // RECORDS
    V_PER_RECORD: tl.constexpr = NUM_V_HEADS // RECORDS
    K_AT: tl.constexpr = K_SIZE // RECORDS
    V_AT: tl.constexpr = 2 * K_AT
    Z_AT: tl.constexpr = V_AT + V_SIZE // RECORDS
    MIXED: tl.constexpr = 2 * K_SIZE + V_SIZE

    stride = qkvz_stride.to(tl.int64) * STRIDE_UNIT
    k_count = num_tokens * NUM_K_HEADS
    v_count = num_tokens * NUM_V_HEADS
    program = tl.program_id(0)
    logit_programs = tl.cdiv(v_count, BLOCK_LOGITS)
    if program < logit_programs:
        first = program * BLOCK_LOGITS
        _copy_logits(
            ba_ptr, ba_stride, b_ptr, a_ptr, first, v_count, NUM_V_HEADS, V_PER_RECORD, BLOCK_LOGITS
        )
    else:
        tile = program - logit_programs
        part = tile % (2 + 2 * R)  # q, k, R tiles of v, R tiles of z
        first = tile // (2 + 2 * R) * BLOCK_HEADS
        if part < 2:
            _copy_heads(
                qkvz_ptr + part * K_AT, stride, mixed_qkv_ptr + part * K_SIZE, MIXED,
                first, k_count,
                NUM_K_HEADS, K_PER_RECORD, RECORD, HEAD_K_DIM, BLOCK_HEADS, BLOCK_K_DIM,
            )  # fmt: skip
        elif part < 2 + R:
            first = first * R + (part - 2) * BLOCK_HEADS
            _copy_heads(
                qkvz_ptr + V_AT, stride, mixed_qkv_ptr + 2 * K_SIZE, MIXED, first, v_count,
                NUM_V_HEADS, V_PER_RECORD, RECORD, HEAD_V_DIM, BLOCK_HEADS, BLOCK_V_DIM,
            )  # fmt: skip
        else:
            first = first * R + (part - 2 - R) * BLOCK_HEADS
            _copy_heads(
                qkvz_ptr + Z_AT, stride, z_ptr, V_SIZE, first, v_count,
                NUM_V_HEADS, V_PER_RECORD, RECORD, HEAD_V_DIM, BLOCK_HEADS, BLOCK_V_DIM,
            )  # fmt: skip


@functools.cache
def _plan(itemsize, num_k_heads, num_v_heads, head_k_dim, head_v_dim, layout):
    """Return what depends on no row: widths of the results, heads per program, the vector."""
    block_k, block_v = triton.next_power_of_2(head_k_dim), triton.next_power_of_2(head_v_dim)
    block_heads = max(1, _TILE // max(block_k, block_v))
    v_size = num_v_heads * head_v_dim
    mixed = 2 * num_k_heads * head_k_dim + v_size

    @functools.cache
    def launch(unit, pdl):
        return Launch(
            fused_qkvzba_kernel,
            num_warps=_WARPS,
            pdl=pdl,
            NUM_K_HEADS=num_k_heads,
            NUM_V_HEADS=num_v_heads,
            HEAD_K_DIM=head_k_dim,
            HEAD_V_DIM=head_v_dim,
            INTERLEAVED=layout == "interleaved",
            STRIDE_UNIT=unit,
            BLOCK_HEADS=block_heads,
            BLOCK_K_DIM=block_k,
            BLOCK_V_DIM=block_v,
            BLOCK_LOGITS=_LOGITS,
        )

    return mixed, (v_size, head_v_dim, 1), block_heads, 16 // itemsize, launch


def fused_qkvzba(qkvz, ba, *, head_k_dim, head_v_dim, layout="interleaved"):
    m, num_k_heads, num_v_heads, r = spec.sizes(
        qkvz, ba, head_k_dim=head_k_dim, head_v_dim=head_v_dim, layout=layout
    )
    dtype, ba_dtype = qkvz.dtype, ba.dtype
    mixed, z_strides, block_heads, vector, launch = _plan(
        dtype.itemsize, num_k_heads, num_v_heads, head_k_dim, head_v_dim, layout
    )
    outputs = (
        empty(qkvz, (m, mixed), dtype),
        empty(qkvz, (m, num_v_heads, head_v_dim), dtype, z_strides),
        empty(ba, (m, num_v_heads), ba_dtype),
        empty(ba, (m, num_v_heads), ba_dtype),
    )
    if m == 0:
        return outputs
    if m * num_v_heads > _MAX_HEADS:
        raise InputError("qkvz.shape[0]", m, f"at most {_MAX_HEADS // num_v_heads} rows")
    # One row's stride may be any number: it must not choose the slow variant, nor exceed 32 bits.
    stride, ba_stride = (qkvz.stride(0), ba.stride(0)) if m > 1 else (0, 0)
    unit = 1 if stride % vector else vector
    programs = -(-m * num_v_heads // _LOGITS) + -(-m * num_k_heads // block_heads) * (2 + 2 * r)
    pdl = programs <= _PDL_PROGRAMS and has_pdl(qkvz.get_device())
    launch(unit, pdl)(programs, qkvz, ba, *outputs, m, stride // unit, ba_stride)
    return outputs

"""Gemma4's norms of attention heads in Triton: q, k and v, or q and k that is also v, or q alone.

The heads of all rows are numbered through, tensor by tensor, and a program normalises BLOCK_HEADS
successive ones: a tile may span rows, so that few heads per row still fill a program.  A head is
read once and lies in registers.  Programs of one row block lie side by side: what they read is one
piece of memory where q, k and v are slices of one buffer.
"""

import functools

import triton
import triton.language as tl

from hwfuse import InputError
from hwfuse.ops import q_keqv_rms_norm as keqv_spec
from hwfuse.ops import q_rms_norm as q_spec
from hwfuse.ops import q_rms_norm_ as q_in_place_spec
from hwfuse.ops import qkv_rms_norm as qkv_spec
from hwfuse.ops import qkv_rms_norm_ as qkv_in_place_spec
from hwfuse_triton._launch import Launch, empty, has_pdl

# Bytes of heads per program, and warps: many light programs start sooner, few heavy ones cost less
# where the device is full.  A head wider than a tile has a program, and warps in proportion.
_SMALL, _LARGE = (2048, 1), (4096, 4)
SMALL_ELEMENTS = 2**21  # of q, k and v together: up to here the small tiles win on an H200
_MAX_HEADS = 2**31 - 2**20  # of q and k, over all rows: they are numbered in 32 bits


@triton.jit
def _row_sums(x, BLOCK_HEADS: tl.constexpr, CHUNK: tl.constexpr, HALVINGS: tl.constexpr):
    """Add up each row, in one order for all tiles: a row's bits do not depend on the others.

    CHUNK elements lie side by side in one warp, of any tile.  Their sums are added two by two,
    where order means nothing.
    """
    sums = tl.sum(tl.reshape(x, (BLOCK_HEADS, 1 << HALVINGS, CHUNK)), axis=2)
    for step in tl.static_range(HALVINGS):
        sums = tl.sum(tl.reshape(sums, (BLOCK_HEADS, 1 << (HALVINGS - 1 - step), 2)), axis=2)
    return tl.reshape(sums, (BLOCK_HEADS, 1))


@triton.jit
def _unit_heads(
    source_ptr,
    source_stride,
    first,
    count,
    eps,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
    HALVINGS: tl.constexpr,
):
    """Load heads *first*... of *count*, each divided by its root mean square, in float32."""
    item = first + tl.arange(0, BLOCK_HEADS)
    column = tl.arange(0, CHUNK << HALVINGS)
    at = (item // HEADS).to(tl.int64) * source_stride + (item % HEADS) * WIDTH
    mask = (item < count)[:, None] & (column < WIDTH)[None, :]
    x = tl.load(source_ptr + at[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
    return x * tl.rsqrt(_row_sums(x * x, BLOCK_HEADS, CHUNK, HALVINGS) / WIDTH + eps)


@triton.jit
def _store_heads(
    target_ptr,
    target_stride,
    value,
    first,
    count,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Store what `_unit_heads` gave, weighted or not; the one rounding is here."""
    item = first + tl.arange(0, BLOCK_HEADS)
    column = tl.arange(0, BLOCK_WIDTH)
    to = (item // HEADS).to(tl.int64) * target_stride + (item % HEADS) * WIDTH
    mask = (item < count)[:, None] & (column < WIDTH)[None, :]
    value = value.to(target_ptr.dtype.element_ty)
    tl.store(target_ptr + to[:, None] + column[None, :], value, mask=mask)


@triton.jit
def _weights(weight_ptr, WIDTH: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Load a weight once for each head of a tile: that is cheaper than to pass it around."""
    column = tl.zeros((BLOCK_HEADS, 1), tl.int32) + tl.arange(0, BLOCK_WIDTH)[None, :]
    return tl.load(weight_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["num_tokens", "q_stride", "k_stride", "v_stride", "eps"])
def qkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    q_out_ptr,
    k_out_ptr,
    v_out_ptr,
    q_weight_ptr,
    k_weight_ptr,
    num_tokens,
    q_stride,  # in STRIDE_UNIT elements: a factor in the code proves the alignment of rows
    k_stride,
    v_stride,
    eps,
    NUM_Q_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    IN_PLACE: tl.constexpr,
    K_IS_V: tl.constexpr,  # then nothing is read from v_ptr
    STRIDE_UNIT: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
    HALVINGS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    KV_PARTS: tl.constexpr = 1 if K_IS_V else 2
    Q_PARTS: tl.constexpr = (NUM_Q_HEADS + NUM_KV_HEADS - 1) // NUM_KV_HEADS
    WIDTH: tl.constexpr = CHUNK << HALVINGS
    q_from = q_stride.to(tl.int64) * STRIDE_UNIT
    k_from = k_stride.to(tl.int64) * STRIDE_UNIT
    v_from = v_stride.to(tl.int64) * STRIDE_UNIT
    q_to, k_to, v_to = q_from, k_from, v_from
    if not IN_PLACE:
        q_to, k_to, v_to = NUM_Q_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM

    program = tl.program_id(0)
    block = program // (KV_PARTS + Q_PARTS)
    part = program % (KV_PARTS + Q_PARTS)
    kv_first = block * BLOCK_HEADS
    kv_count = num_tokens * NUM_KV_HEADS
    if part >= KV_PARTS:
        first = (block * Q_PARTS + part - KV_PARTS) * BLOCK_HEADS
        count = num_tokens * NUM_Q_HEADS
        weights = _weights(q_weight_ptr, HEAD_DIM, BLOCK_HEADS, WIDTH)
        q = weights * _unit_heads(
            q_ptr, q_from, first, count, eps, NUM_Q_HEADS, HEAD_DIM, BLOCK_HEADS, CHUNK, HALVINGS
        )
        _store_heads(q_out_ptr, q_to, q, first, count, NUM_Q_HEADS, HEAD_DIM, BLOCK_HEADS, WIDTH)
    elif part == 0:
        weights = _weights(k_weight_ptr, HEAD_DIM, BLOCK_HEADS, WIDTH)
        k = _unit_heads(
            k_ptr, k_from, kv_first, kv_count, eps,
            NUM_KV_HEADS, HEAD_DIM, BLOCK_HEADS, CHUNK, HALVINGS,
        )  # fmt: skip
        if K_IS_V:
            _store_heads(
                v_out_ptr, v_to, k, kv_first, kv_count, NUM_KV_HEADS, HEAD_DIM, BLOCK_HEADS, WIDTH
            )
        k *= weights
        _store_heads(
            k_out_ptr, k_to, k, kv_first, kv_count, NUM_KV_HEADS, HEAD_DIM, BLOCK_HEADS, WIDTH
        )
    else:
        v = _unit_heads(
            v_ptr, v_from, kv_first, kv_count, eps,
            NUM_KV_HEADS, HEAD_DIM, BLOCK_HEADS, CHUNK, HALVINGS,
        )  # fmt: skip
        _store_heads(
            v_out_ptr, v_to, v, kv_first, kv_count, NUM_KV_HEADS, HEAD_DIM, BLOCK_HEADS, WIDTH
        )


@triton.jit(do_not_specialize=["num_tokens", "q_stride", "eps"])
def q_kernel(
    q_ptr,
    q_out_ptr,
    q_weight_ptr,
    num_tokens,
    q_stride,  # in STRIDE_UNIT elements
    eps,
    NUM_Q_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    IN_PLACE: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
    HALVINGS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    WIDTH: tl.constexpr = CHUNK << HALVINGS
    q_from = q_stride.to(tl.int64) * STRIDE_UNIT
    q_to = q_from
    if not IN_PLACE:
        q_to = NUM_Q_HEADS * HEAD_DIM
    first = tl.program_id(0) * BLOCK_HEADS
    count = num_tokens * NUM_Q_HEADS
    weights = _weights(q_weight_ptr, HEAD_DIM, BLOCK_HEADS, WIDTH)
    q = weights * _unit_heads(
        q_ptr, q_from, first, count, eps, NUM_Q_HEADS, HEAD_DIM, BLOCK_HEADS, CHUNK, HALVINGS
    )
    _store_heads(q_out_ptr, q_to, q, first, count, NUM_Q_HEADS, HEAD_DIM, BLOCK_HEADS, WIDTH)


@functools.cache
def _launch(kernel, head_dim, itemsize, wave, is_small, pdl, unit, num_heads, more=()):
    """Return the launch and the number of heads that its programs take each.

    *more*: the constants that only `qkv_kernel` has.
    """
    width = triton.next_power_of_2(head_dim)
    tile, warps = _SMALL if is_small else _LARGE
    head = width * itemsize
    if head > tile:
        tile, warps = head, min(warps * head // tile, 32)
    chunk = min(width, wave * 16 // itemsize)  # 16 bytes per thread of a warp
    launch = Launch(
        kernel,
        num_warps=max(1, warps * 32 // wave),
        pdl=pdl,
        NUM_Q_HEADS=num_heads,
        HEAD_DIM=head_dim,
        STRIDE_UNIT=unit,
        BLOCK_HEADS=tile // head,
        CHUNK=chunk,
        HALVINGS=(width // chunk).bit_length() - 1,
        **dict(more),
    )
    return launch, tile // head


def _run_qkv(q, k, v, outputs, q_weight, k_weight, sizes, head_dim, eps, wave):
    """Write the norms of q, k and v to *outputs*, which may be they; v may be k."""
    m, num_q_heads, num_kv_heads = sizes
    num_heads = num_q_heads + num_kv_heads
    if m * num_heads > _MAX_HEADS:
        raise InputError("q.shape[0]", m, f"at most {_MAX_HEADS // num_heads} rows")
    itemsize = q.element_size()
    q_stride, k_stride, v_stride = q.stride(0), k.stride(0), v.stride(0)
    # A single row's stride decides too: how wide loads are is part of the order of the sum.
    unit = 1 if (q_stride | k_stride | v_stride) % (16 // itemsize) else 16 // itemsize
    if m == 1:  # any number, perhaps one of more than 32 bits
        q_stride = k_stride = v_stride = 0
    k_is_v = v is k
    launch, block_heads = _launch(
        qkv_kernel,
        head_dim,
        itemsize,
        wave,
        m * (num_heads + num_kv_heads) * head_dim <= SMALL_ELEMENTS,
        has_pdl(q.get_device()),
        unit,
        num_q_heads,
        (
            ("NUM_KV_HEADS", num_kv_heads),
            ("IN_PLACE", outputs[0] is q),
            ("K_IS_V", k_is_v),
        ),
    )
    parts = -(-num_q_heads // num_kv_heads) + 2 - k_is_v
    launch(
        -(-m * num_kv_heads // block_heads) * parts,
        q, k, v, *outputs, q_weight, k_weight,
        m, q_stride // unit, k_stride // unit, v_stride // unit, eps,
    )  # fmt: skip


def _run_q(q, output, q_weight, sizes, head_dim, eps, wave):
    """Write the norm of q to *output*, which may be q."""
    m, num_q_heads = sizes
    num_heads = m * num_q_heads
    if num_heads > _MAX_HEADS:
        raise InputError("q.shape[0]", m, f"at most {_MAX_HEADS // num_q_heads} rows")
    itemsize, stride = q.element_size(), q.stride(0)
    unit = 1 if stride % (16 // itemsize) else 16 // itemsize
    launch, block_heads = _launch(
        q_kernel,
        head_dim,
        itemsize,
        wave,
        num_heads * head_dim <= SMALL_ELEMENTS,
        has_pdl(q.get_device()),
        unit,
        num_q_heads,
        (("IN_PLACE", output is q),),
    )
    stride = stride // unit if m > 1 else 0
    launch(-(-num_heads // block_heads), q, output, q_weight, m, stride, eps)


def qkv_rms_norm(q, k, v, q_weight, k_weight, *, head_dim, eps=1e-6, wave=32):
    sizes = qkv_spec.sizes(q, k, v, q_weight, k_weight, head_dim=head_dim, eps=eps)
    dtype = q.dtype
    outputs = empty(q, q.shape, dtype), empty(k, k.shape, dtype), empty(v, v.shape, dtype)
    if sizes.m:
        _run_qkv(q, k, v, outputs, q_weight, k_weight, sizes, head_dim, eps, wave)
    return outputs


def qkv_rms_norm_(q, k, v, q_weight, k_weight, *, head_dim, eps=1e-6, wave=32):
    sizes = qkv_in_place_spec.sizes(q, k, v, q_weight, k_weight, head_dim=head_dim, eps=eps)
    if sizes.m:
        _run_qkv(q, k, v, (q, k, v), q_weight, k_weight, sizes, head_dim, eps, wave)


def q_keqv_rms_norm(q, kv, q_weight, k_weight, *, head_dim, eps=1e-6, wave=32):
    sizes = keqv_spec.sizes(q, kv, q_weight, k_weight, head_dim=head_dim, eps=eps)
    dtype, kv_shape = q.dtype, kv.shape
    outputs = empty(q, q.shape, dtype), empty(kv, kv_shape, dtype), empty(kv, kv_shape, dtype)
    if sizes.m:
        _run_qkv(q, kv, kv, outputs, q_weight, k_weight, sizes, head_dim, eps, wave)
    return outputs


def q_rms_norm(q, q_weight, *, head_dim, eps=1e-6, wave=32):
    sizes = q_spec.sizes(q, q_weight, head_dim=head_dim, eps=eps)
    output = empty(q, q.shape, q.dtype)
    if sizes.m:
        _run_q(q, output, q_weight, sizes, head_dim, eps, wave)
    return output


def q_rms_norm_(q, q_weight, *, head_dim, eps=1e-6, wave=32):
    sizes = q_in_place_spec.sizes(q, q_weight, head_dim=head_dim, eps=eps)
    if sizes.m:
        _run_q(q, q, q_weight, sizes, head_dim, eps, wave)

"""fused_qkvbfg in Triton: two launches that overlap, for few tokens made of loads alone.

The first makes the two low ranks.  The second makes everything else: q, k, v and beta, which do not
wait for the first, and the gates, which do.  With programmatic dependent launch the low ranks and
the gates so hide behind the reading of the large weight; without it the launches follow each other.

Tiles are weights x tokens: a tensor core takes 64 rows of weights at least, but few tokens.
"""

import functools
from typing import NamedTuple

import triton
import triton.language as tl

from hwfuse.ops import fused_qkvbfg as spec
from hwfuse_triton._launch import Launch, empty, has_pdl


@triton.jit
def _product(
    x_ptr,
    x_stride,
    w_ptr,
    w_stride,
    first_token,
    num_tokens,
    first_row,
    num_rows,
    CHANNELS: tl.constexpr,
    SPAN: tl.constexpr,
    SIDES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return [BLOCK_M, BLOCK_N] sums over all channels, in float32.

    With two SIDES the tile has the first half of the channels of each row and token, and below it
    the second: half as many rows then fill a tensor core.  It also computes first half times second
    half, which is dropped.  SPAN is CHANNELS rounded up to what the loop covers.
    """
    side: tl.constexpr = SPAN // SIDES
    column = tl.arange(0, BLOCK_K)
    tile_row = tl.arange(0, SIDES * BLOCK_N)
    tile_token = tl.arange(0, SIDES * BLOCK_M)
    row = tl.minimum(first_row + tile_row % BLOCK_N, num_rows - 1).to(tl.int64)
    token = first_token + tile_token % BLOCK_M
    w_start = tile_row // BLOCK_N * side
    x_start = tile_token // BLOCK_M * side
    w_ptrs = w_ptr + (row * w_stride + w_start)[:, None] + column[None, :]
    x_ptrs = x_ptr + (token.to(tl.int64) * x_stride + x_start)[:, None] + column[None, :]
    x_mask = (token < num_tokens)[:, None]
    sums = tl.zeros((SIDES * BLOCK_N, SIDES * BLOCK_M), tl.float32)
    for k in range(0, side, BLOCK_K):
        # x by way of L2: an L1 may hold what lay there before the kernel that wrote x.
        if CHANNELS == SPAN:
            w = tl.load(w_ptrs + k)
            x = tl.load(x_ptrs + k, mask=x_mask, other=0.0, cache_modifier=".cg")
        else:
            w_mask = (w_start[:, None] + column[None, :] + k) < CHANNELS
            w = tl.load(w_ptrs + k, mask=w_mask, other=0.0)
            mask = x_mask & ((x_start[:, None] + column[None, :] + k) < CHANNELS)
            x = tl.load(x_ptrs + k, mask=mask, other=0.0, cache_modifier=".cg")
        sums = tl.dot(w, x.T, sums, input_precision="ieee")
    if SIDES > 1:
        sums = tl.reshape(sums, (SIDES, BLOCK_N, SIDES, BLOCK_M))
        index = tl.arange(0, SIDES)
        same = index[:, None, None, None] == index[None, None, :, None]
        sums = tl.sum(tl.sum(tl.where(same, sums, 0.0), axis=2), axis=0)
    return sums.T


@triton.jit
def _product_of_one(
    x_ptr,
    w_ptr,
    w_stride,
    num_tokens,
    first_row,
    num_rows,
    CHANNELS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return [1, BLOCK_N] sums over all channels for a single token, without tensor cores."""
    row = tl.minimum(first_row + tl.arange(0, BLOCK_N), num_rows - 1).to(tl.int64)
    column = tl.arange(0, BLOCK_K)
    w_ptrs = w_ptr + (row * w_stride)[:, None] + column[None, :]
    sums = tl.zeros((BLOCK_N,), tl.float32)
    for k in range(0, CHANNELS, BLOCK_K):
        mask = column + k < CHANNELS
        w = tl.load(w_ptrs + k, mask=mask[None, :], other=0.0)
        # Always true, and a bound that the compiler does not move loads across: all of w is asked
        # for before anything waits.
        if num_tokens > 0:
            x = tl.load(x_ptr + column + k, mask=mask, other=0.0, cache_modifier=".cg")
            sums += tl.sum(w.to(tl.float32) * x.to(tl.float32)[None, :], axis=1)
    return sums[None, :]


@triton.jit
def _columns(
    x_ptr,
    x_stride,
    w_ptr,
    w_stride,
    qkvbfg_ptr,
    program,
    num_tokens,
    FIRST: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SPAN: tl.constexpr,
    SIDES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write one tile of the NUM_ROWS columns of the first result from FIRST on."""
    TILES: tl.constexpr = (NUM_ROWS + BLOCK_N - 1) // BLOCK_N
    first_row = program % TILES * BLOCK_N
    first_token = program // TILES * BLOCK_M
    w_ptr += FIRST * w_stride
    if BLOCK_M == 1:
        value = _product_of_one(
            x_ptr, w_ptr, w_stride, num_tokens, first_row, NUM_ROWS, CHANNELS, BLOCK_N, BLOCK_K
        )
    else:
        value = _product(
            x_ptr, x_stride, w_ptr, w_stride, first_token, num_tokens, first_row, NUM_ROWS,
            CHANNELS, SPAN, SIDES, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    token = first_token + tl.arange(0, BLOCK_M)
    column = first_row + tl.arange(0, BLOCK_N)
    to = token.to(tl.int64)[:, None] * NUM_COLUMNS + FIRST + column[None, :]
    mask = (token < num_tokens)[:, None] & (column < NUM_ROWS)[None, :]
    tl.store(qkvbfg_ptr + to, value.to(qkvbfg_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "x_stride", "w_stride"])
def low_rank_kernel(
    x_ptr,
    w_ptr,
    qkvbfg_ptr,
    num_tokens,
    x_stride,  # in STRIDE_UNIT elements: a factor in the code proves the alignment of rows
    w_stride,
    NUM_COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPAN: tl.constexpr,
    SIDES: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        # In this order: no program of the second launch starts before x is there.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    _columns(
        x_ptr, x_stride.to(tl.int64) * STRIDE_UNIT, w_ptr, w_stride.to(tl.int64) * STRIDE_UNIT,
        qkvbfg_ptr, tl.program_id(0), num_tokens,
        NUM_COLUMNS - 2 * HEAD_DIM, 2 * HEAD_DIM, NUM_COLUMNS,
        CHANNELS, SPAN, SIDES, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip


@triton.jit
def _gates(
    qkvbfg_ptr,
    w_fg_ptr,
    w_fg_stride,
    w_fg_gate_stride,
    gates_ptr,
    program,
    num_tokens,
    NUM_COLUMNS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_GATES: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Write one tile of a gate, from the low ranks that the first launch made."""
    WIDTH: tl.constexpr = NUM_HEADS * HEAD_DIM
    TILES: tl.constexpr = (WIDTH + BLOCK_GATES - 1) // BLOCK_GATES
    gate = program // TILES % 2
    token = program // (2 * TILES) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = program % TILES * BLOCK_GATES + tl.arange(0, BLOCK_GATES)
    rank = tl.arange(0, BLOCK_DIM)
    w_ptrs = w_fg_ptr + gate * w_fg_gate_stride
    w_ptrs += column.to(tl.int64)[:, None] * w_fg_stride + rank[None, :]
    low_rank_ptrs = qkvbfg_ptr + token.to(tl.int64)[:, None] * NUM_COLUMNS + rank[None, :]
    low_rank_ptrs += NUM_COLUMNS - (2 - gate) * HEAD_DIM
    w_mask = (column < WIDTH)[:, None]
    mask = (token < num_tokens)[:, None]
    inside = (rank < HEAD_DIM)[None, :]
    w = tl.load(w_ptrs, mask=w_mask & inside, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    low_rank = tl.load(low_rank_ptrs, mask=mask & inside, other=0.0)
    value = tl.dot(w, low_rank.T, input_precision="ieee")
    for k in range(BLOCK_DIM, HEAD_DIM, BLOCK_DIM):
        inside = (rank + k < HEAD_DIM)[None, :]
        w = tl.load(w_ptrs + k, mask=w_mask & inside, other=0.0)
        low_rank = tl.load(low_rank_ptrs + k, mask=mask & inside, other=0.0)
        value = tl.dot(w, low_rank.T, value, input_precision="ieee")
    to = (gate.to(tl.int64) * num_tokens + token)[:, None] * WIDTH + column[None, :]
    mask = mask & (column < WIDTH)[None, :]
    tl.store(gates_ptr + to, value.T.to(gates_ptr.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["num_tokens", "x_stride", "w_stride", "w_fg_stride", "w_fg_gate_stride"]
)
def rest_kernel(
    x_ptr,
    w_ptr,
    w_fg_ptr,
    qkvbfg_ptr,
    gates_ptr,
    num_tokens,
    x_stride,  # these four in STRIDE_UNIT elements
    w_stride,
    w_fg_stride,
    w_fg_gate_stride,
    NUM_COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPAN: tl.constexpr,
    SIDES: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GATES_M: tl.constexpr,
    BLOCK_GATES: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    ROWS: tl.constexpr = NUM_COLUMNS - 2 * HEAD_DIM
    program = tl.program_id(0)
    products = tl.cdiv(num_tokens, BLOCK_M) * ((ROWS + BLOCK_N - 1) // BLOCK_N)
    if program < products:
        _columns(
            x_ptr, x_stride.to(tl.int64) * STRIDE_UNIT, w_ptr, w_stride.to(tl.int64) * STRIDE_UNIT,
            qkvbfg_ptr, program, num_tokens, 0, ROWS, NUM_COLUMNS,
            CHANNELS, SPAN, SIDES, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        _gates(
            qkvbfg_ptr,
            w_fg_ptr, w_fg_stride.to(tl.int64) * STRIDE_UNIT,
            w_fg_gate_stride.to(tl.int64) * STRIDE_UNIT,
            gates_ptr, program - products, num_tokens,
            NUM_COLUMNS, NUM_HEADS, HEAD_DIM, GATES_M, BLOCK_GATES, BLOCK_DIM, PDL,
        )  # fmt: skip


class Tile(NamedTuple):
    """Shape of the tiles of one kind, their warps and pipeline.

    More than one side takes 4 warps: with 8, Triton 3.6 compiles wrong sums for sm90.
    """

    block_m: int
    block_n: int
    block_k: int
    sides: int
    stages: int
    warps: int
    block_gates: int = 32


# Those of up to 64 tokens were measured on an H200, whose 132 multiprocessors take one or two
# programs each: tiles of 64 rows of a small slice's weights would leave some without work.
_FEW_ROWS = 64 * 132
_LOW_RANK = {
    16: Tile(16, 16, 64, 4, 10, 4),
    32: Tile(16, 16, 64, 4, 10, 4),
    64: Tile(16, 32, 128, 2, 5, 4),
}
_FEW = {
    16: Tile(16, 32, 128, 2, 5, 4, 64),
    32: Tile(32, 32, 128, 2, 5, 4, 64),
    64: Tile(64, 32, 64, 2, 6, 4),
}
_MANY = {
    16: Tile(16, 64, 128, 1, 6, 4, 64),
    32: Tile(32, 64, 128, 1, 4, 4, 64),
    64: Tile(64, 128, 64, 1, 6, 8),
}
# Within 64 KiB of LDS; chosen by what they compile to, not measured.
_AMD = {
    16: Tile(16, 16, 256, 1, 2, 2),
    32: Tile(32, 32, 128, 1, 2, 4),
    64: Tile(64, 32, 128, 1, 2, 4),
    128: Tile(128, 128, 64, 1, 2, 4, 64),
}


def tiles(m, rows, itemsize, wave):
    """Return the tiles of the low ranks and those of the *rows* other columns."""
    if m == 1:
        one = Tile(1, 2, 8192 // itemsize, 1, 1, 128 // wave)
        return one, one
    block_m = 16 if m <= 16 else 32 if m <= 32 else 64 if m <= 64 else 128
    if itemsize == 4:  # no tensor cores: a tile of both operands lies in registers
        tile = Tile(min(block_m, 32), 32, 32, 1, 2, 256 // wave)
        return tile, tile
    if wave == 64:
        return _AMD[16 if block_m <= 64 else 128], _AMD[block_m]
    return _LOW_RANK[block_m], (_FEW if rows <= _FEW_ROWS else _MANY)[block_m]


@functools.cache
def _plan(low_rank, rest, channels, num_heads, head_dim, unit, pdl):
    """Return both launches, and how many programs a block of tokens of each kind of tile takes."""
    width = num_heads * head_dim
    rows = 3 * width + num_heads
    gates_m, block_gates = min(max(16, rest.block_m), 64), rest.block_gates
    constants = {
        "pdl": pdl,
        "NUM_COLUMNS": rows + 2 * head_dim,
        "CHANNELS": channels,
        "HEAD_DIM": head_dim,
        "STRIDE_UNIT": unit,
    }
    first = Launch(low_rank_kernel, **constants, **_options(low_rank, channels))
    second = Launch(
        rest_kernel,
        **constants,
        **_options(rest, channels),
        NUM_HEADS=num_heads,
        GATES_M=gates_m,
        BLOCK_GATES=block_gates,
        BLOCK_DIM=min(max(16, triton.next_power_of_2(head_dim)), 128),
    )
    low_ranks = -(-2 * head_dim // low_rank.block_n)
    return first, low_ranks, second, -(-rows // rest.block_n), gates_m, 2 * -(-width // block_gates)


def _options(tile, channels):
    step = tile.block_k * tile.sides
    return {
        "num_warps": tile.warps,
        "options": {"num_stages": tile.stages},
        "SPAN": -(-channels // step) * step,
        "SIDES": tile.sides,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
    }


def fused_qkvbfg(x, w_qkvbfg, w_fg, *, wave=32):
    m, n, channels, num_heads, head_dim = spec.sizes(x, w_qkvbfg, w_fg)
    qkvbfg = empty(x, (m, n), x.dtype)
    gates = empty(x, (2, m, num_heads * head_dim), x.dtype)
    if m == 0:
        return qkvbfg, gates
    itemsize = x.element_size()
    x_stride = x.stride(0) if m > 1 else 0
    w_stride, (gate_stride, fg_stride, _) = w_qkvbfg.stride(0), w_fg.stride()
    unit = 16 // itemsize
    if (x_stride | w_stride | gate_stride | fg_stride) % unit:
        unit = 1
    low_rank, rest = tiles(m, n - 2 * head_dim, itemsize, wave)
    first, low_ranks, second, columns, gates_m, num_gates = _plan(
        low_rank, rest, channels, num_heads, head_dim, unit, has_pdl(x.get_device())
    )
    x_stride, w_stride = x_stride // unit, w_stride // unit
    first(-(-m // low_rank.block_m) * low_ranks, x, w_qkvbfg, qkvbfg, m, x_stride, w_stride)
    second(
        -(-m // rest.block_m) * columns - (-m // gates_m) * num_gates,
        x, w_qkvbfg, w_fg, qkvbfg, gates,
        m, x_stride, w_stride, fg_stride // unit, gate_stride // unit,
    )  # fmt: skip
    return qkvbfg, gates

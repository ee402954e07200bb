"""w4a8_moe_prep in Triton: a stable counting sort of the routes by expert, without atomics.

Few routes: one launch, in which the program of an expert reads all ids.  It counts those in front
of its own, which says where its rows begin, and numbers its own.

Many routes: three launches.  A chunk counts its routes by expert; an expert adds up what the chunks
counted; a chunk gives its routes their rows.  How many routes of a chunk have the same expert and
come first, is found by comparing all pairs: a chunk is small, and Triton has no memory for cursors.
"""

import functools

import torch
import triton
import triton.language as tl

from hwfuse.ops import w4a8_moe_prep as spec
from hwfuse_triton._launch import Launch, empty, has_pdl
from hwfuse_triton.moe_rows import wait

FEW_ROUTES = 1024
_CHUNK = 128
_OTHERS = 32  # that are compared with a chunk's routes at a time


@triton.jit
def _experts(
    ids_ptr,
    route,
    num_routes,
    ids_stride,
    num_experts,
    TOPK: tl.constexpr,
    IS_DENSE: tl.constexpr,
):
    """Load the experts of some routes; num_experts for those that are not valid."""
    at = route if IS_DENSE else (route // TOPK).to(tl.int64) * ids_stride + route % TOPK
    expert = tl.load(ids_ptr + at, mask=route < num_routes, other=-1)
    return tl.where((expert >= 0) & (expert < num_experts), expert, num_experts)


@triton.jit
def _store_expert(offsets_ptr, sizes1_ptr, sizes2_ptr, e, start, count, num_experts, n, k):
    """Store the results that each expert has one of."""
    tl.store(offsets_ptr + e, start)
    if e == num_experts - 1:
        tl.store(offsets_ptr + num_experts, start + count)
    tl.store(sizes1_ptr + e * 3, 2 * n)
    tl.store(sizes1_ptr + e * 3 + 1, count)
    tl.store(sizes1_ptr + e * 3 + 2, k)
    tl.store(sizes2_ptr + e * 3, k)
    tl.store(sizes2_ptr + e * 3 + 1, count)
    tl.store(sizes2_ptr + e * 3 + 2, n)


@triton.jit(do_not_specialize=["num_routes", "ids_stride", "num_experts", "n", "k"])
def expert_kernel(
    ids_ptr,
    offsets_ptr,
    sizes1_ptr,
    sizes2_ptr,
    row_ptr,
    token_ptr,
    num_routes,
    ids_stride,
    num_experts,
    n,
    k,
    TOPK: tl.constexpr,
    IS_DENSE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait(PDL)
    e = tl.program_id(0)
    route = tl.arange(0, BLOCK)
    expert = _experts(ids_ptr, route, num_routes, ids_stride, num_experts, TOPK, IS_DENSE)
    is_mine = expert == e
    mine = is_mine.to(tl.int32)
    start = tl.sum((expert < e).to(tl.int32), axis=0)
    count = tl.sum(mine, axis=0)
    _store_expert(offsets_ptr, sizes1_ptr, sizes2_ptr, e, start, count, num_experts, n, k)
    row = start + tl.cumsum(mine, axis=0) - 1
    tl.store(row_ptr + route, row, mask=is_mine)
    tl.store(token_ptr + row, route // TOPK, mask=is_mine)
    if e == num_experts - 1:  # the last one knows how many rows there are
        is_route = route < num_routes
        is_invalid = expert == num_experts
        tl.store(row_ptr + route, tl.full([BLOCK], -1, tl.int32), mask=is_route & is_invalid)
        is_rest = is_route & (route >= start + count)
        tl.store(token_ptr + route, tl.zeros([BLOCK], tl.int32), mask=is_rest)


@triton.jit(do_not_specialize=["num_routes", "ids_stride", "num_experts", "num_chunks"])
def count_kernel(
    ids_ptr,
    counts_ptr,  # [2, num_experts, num_chunks]: routes to an expert, and to those before it
    num_routes,
    ids_stride,
    num_experts,
    num_chunks,
    TOPK: tl.constexpr,
    IS_DENSE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait(PDL)
    chunk = tl.program_id(0)
    route = chunk * BLOCK + tl.arange(0, BLOCK)
    expert = _experts(ids_ptr, route, num_routes, ids_stride, num_experts, TOPK, IS_DENSE)
    counts = tl.histogram(expert, BLOCK_EXPERTS)
    before = tl.cumsum(counts, axis=0) - counts
    e = tl.arange(0, BLOCK_EXPERTS)
    at = e.to(tl.int64) * num_chunks + chunk
    tl.store(counts_ptr + at, counts, mask=e < num_experts)
    at += num_experts.to(tl.int64) * num_chunks
    tl.store(counts_ptr + at, before, mask=e < num_experts)


@triton.jit(do_not_specialize=["num_experts", "num_chunks", "n", "k"])
def add_kernel(
    counts_ptr,  # the counts become the first rows of the chunks
    offsets_ptr,
    sizes1_ptr,
    sizes2_ptr,
    num_experts,
    num_chunks,
    n,
    k,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait(PDL)
    e = tl.program_id(0)
    chunk = tl.arange(0, BLOCK)
    at = counts_ptr + e.to(tl.int64) * num_chunks + chunk
    before_at = at + num_experts.to(tl.int64) * num_chunks
    counts = tl.load(at, mask=chunk < num_chunks, other=0)
    start = tl.sum(tl.load(before_at, mask=chunk < num_chunks, other=0), axis=0)
    tl.store(at, start + tl.cumsum(counts, axis=0) - counts, mask=chunk < num_chunks)
    count = tl.sum(counts, axis=0)
    _store_expert(offsets_ptr, sizes1_ptr, sizes2_ptr, e, start, count, num_experts, n, k)


@triton.jit(do_not_specialize=["num_routes", "ids_stride", "num_experts", "num_chunks"])
def place_kernel(
    ids_ptr,
    first_rows_ptr,
    offsets_ptr,
    row_ptr,
    token_ptr,
    num_routes,
    ids_stride,
    num_experts,
    num_chunks,
    TOPK: tl.constexpr,
    IS_DENSE: tl.constexpr,
    BLOCK: tl.constexpr,
    OTHERS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait(PDL)
    chunk = tl.program_id(0)
    each = tl.arange(0, BLOCK)
    route = chunk * BLOCK + each
    expert = _experts(ids_ptr, route, num_routes, ids_stride, num_experts, TOPK, IS_DENSE)
    is_valid = expert < num_experts
    at = expert.to(tl.int64) * num_chunks + chunk
    row = tl.load(first_rows_ptr + at, mask=is_valid, other=0)
    for first in range(0, BLOCK, OTHERS):
        other = first + tl.arange(0, OTHERS)
        others = _experts(
            ids_ptr, chunk * BLOCK + other, num_routes, ids_stride, num_experts, TOPK, IS_DENSE
        )
        is_before = (others[None, :] == expert[:, None]) & (other[None, :] < each[:, None])
        row += tl.sum(is_before.to(tl.int32), axis=1)
    is_route = route < num_routes
    tl.store(row_ptr + route, tl.where(is_valid, row, -1), mask=is_route)
    tl.store(token_ptr + row, route // TOPK, mask=is_valid)
    is_rest = is_route & (route >= tl.load(offsets_ptr + num_experts))
    tl.store(token_ptr + route, tl.zeros([BLOCK], tl.int32), mask=is_rest)


@functools.cache
def _expert_launch(topk, is_dense, block, pdl, wave):
    return Launch(
        expert_kernel,
        num_warps=max(1, block // (8 * wave)),
        pdl=pdl,
        TOPK=topk,
        IS_DENSE=is_dense,
        BLOCK=block,
    )


@functools.cache
def _chunk_launches(topk, is_dense, block_experts, block_chunks, pdl, wave):
    ids = {"TOPK": topk, "IS_DENSE": is_dense, "BLOCK": _CHUNK}
    return (
        Launch(count_kernel, num_warps=128 // wave, pdl=pdl, BLOCK_EXPERTS=block_experts, **ids),
        Launch(add_kernel, num_warps=128 // wave, pdl=pdl, BLOCK=block_chunks),
        Launch(place_kernel, num_warps=256 // wave, pdl=pdl, OTHERS=_OTHERS, **ids),
    )


def w4a8_moe_prep(topk_ids, *, num_experts, n, k, wave=32):
    m, topk = spec.sizes(topk_ids, num_experts=num_experts, n=n, k=k)
    routes = m * topk
    offsets = empty(topk_ids, (num_experts + 1,), torch.int32)
    sizes1 = empty(topk_ids, (num_experts, 3), torch.int32)
    sizes2 = empty(topk_ids, (num_experts, 3), torch.int32)
    row = empty(topk_ids, (m, topk), torch.int32)
    token = empty(topk_ids, (routes,), torch.int32)
    stride = topk_ids.stride(0)
    is_dense = m < 2 or stride == topk
    pdl = has_pdl(topk_ids.get_device())
    if routes <= FEW_ROUTES:
        block = 128 if routes <= 128 else FEW_ROUTES
        launch = _expert_launch(topk, is_dense, block, pdl, wave)
        results = offsets, sizes1, sizes2, row, token
        launch(num_experts, topk_ids, *results, routes, stride, num_experts, n, k)
        return results
    chunks = -(-routes // _CHUNK)
    blocks = triton.next_power_of_2(num_experts + 1), triton.next_power_of_2(chunks)
    count, add, place = _chunk_launches(topk, is_dense, *blocks, pdl, wave)
    counts = empty(topk_ids, (2, num_experts, chunks), torch.int32)
    count(chunks, topk_ids, counts, routes, stride, num_experts, chunks)
    add(num_experts, counts, offsets, sizes1, sizes2, num_experts, chunks, n, k)
    place(chunks, topk_ids, counts, offsets, row, token, routes, stride, num_experts, chunks)
    return offsets, sizes1, sizes2, row, token

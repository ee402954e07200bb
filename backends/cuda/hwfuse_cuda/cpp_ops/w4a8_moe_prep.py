"""w4a8_moe_prep: a counting sort in shared memory, of one block or of a cluster of blocks."""

import functools

from torch import Tensor

from hwfuse.ops import w4a8_moe_prep as spec
from hwfuse_cuda._cpp import Kernel, divisor
from hwfuse_triton._launch import empty
from hwfuse_triton._replay import replayed

REQUIRES = {
    "arch": ("sm90", "sm100", "sm103"),  # what has clusters, and shared memory for 1024 experts
    "packages": ("cuda-compiler>=12.0",),
    "facts": (
        "num_experts <= 1024",  # each warp has a counter for each in shared memory
        "m * topk <= 524288",  # of 16 bits; and beyond, a cluster is too small a part of the card
    ),
    "deterministic": True,
}
VARIANTS = {
    "one block": "m * topk <= 768",
    "a cluster of 8 blocks": "m * topk <= 4096",
    "a cluster of 16 blocks, where the card has such": "m * topk > 4096",
}
ONE_BLOCK, SMALL_CLUSTER = 768, 4096  # routes, at most
_TYPES = (*"PPPPPP", *"iiIIqiiii")


@functools.cache
def kernel(num_experts: int, threads: int, cluster: int, rounds: int) -> Kernel:
    bits = max(num_experts - 1, 1).bit_length()
    staged = cluster > 1 and threads > 256 and rounds > 0
    pairs = (num_experts + 1) // 2
    ints = (threads // 32 + 6) * pairs + 66 + (2 * threads * rounds if staged else 0)
    macros = {
        "THREADS": threads,
        "CLUSTER": cluster,
        "BITS": 5 if bits <= 5 else 8 if bits <= 8 else 10,
        "ROUNDS": rounds,
        "STAGED": int(staged),
        "PDL": 1,
    }
    name = "w4a8_moe_prep"
    return Kernel(
        f"{name}.cu", name, _TYPES,
        block=threads, shared=4 * ints, pdl=True, cluster=cluster, defines=macros,
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _launch(device: int, num_experts: int, routes: int) -> tuple[Kernel, int, int]:
    """Return the kernel for so many routes, its blocks, and its rounds of 32 routes per warp."""
    threads, cluster = 512, 1
    if routes > SMALL_CLUSTER:
        cluster = kernel(num_experts, 512, 16, 1).max_cluster(device)
        threads = 1024 if routes > 1024 * cluster else 512
    elif routes > ONE_BLOCK:
        cluster = 8
    if num_experts <= 512 and routes <= 256 * cluster:
        threads = 256
    rounds = -(-routes // (threads * cluster))
    if rounds > 8:
        return kernel(num_experts, threads, cluster, 0), cluster, rounds
    fixed = 1 << max(rounds - 1, 0).bit_length()  # few kernels: 1, 2, 4 or 8 rounds
    return kernel(num_experts, threads, cluster, fixed), cluster, fixed


@replayed
def w4a8_moe_prep(
    topk_ids: Tensor,
    *,
    num_experts: int,
    n: int,
    k: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    m, topk = spec.sizes(topk_ids, num_experts=num_experts, n=n, k=k)
    dtype, device, routes = topk_ids.dtype, topk_ids.get_device(), m * topk
    offsets = empty(topk_ids, (num_experts + 1,), dtype)
    sizes1 = empty(topk_ids, (num_experts, 3), dtype)
    sizes2 = empty(topk_ids, (num_experts, 3), dtype)
    route_to_row = empty(topk_ids, (m, topk), dtype)
    row_to_token = empty(topk_ids, (routes,), dtype)
    launch, blocks, rounds = _launch(device, num_experts, routes)
    launch(
        device, blocks,
        topk_ids.data_ptr(), offsets.data_ptr(), sizes1.data_ptr(), sizes2.data_ptr(),
        route_to_row.data_ptr(), row_to_token.data_ptr(),
        routes, topk, *divisor(topk), topk_ids.stride(0) if m > 1 else topk,
        num_experts, rounds, n, k,
    )  # fmt: skip
    return offsets, sizes1, sizes2, route_to_row, row_to_token

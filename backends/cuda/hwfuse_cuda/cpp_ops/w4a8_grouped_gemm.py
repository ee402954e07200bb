"""w4a8_grouped_gemm on Hopper: int4 weights become the register operand of its tensor cores."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from hwfuse.ops import w4a8_grouped_gemm as spec
from hwfuse_cuda import _cpp, _driver
from hwfuse_triton._launch import empty

REQUIRES = {
    "arch": ("sm90",),  # the only one with these instructions
    "packages": ("cuda-compiler>=12.0",),
    "facts": (
        "b.ndim == 4",  # the blocks of hwfuse.packing.repack_w4a8
        "b.is_contiguous()",
        "aligned(b, 16)",
        "num_experts <= 1024",  # their offsets lie in shared memory
        "aligned(a, 16)",  # a is read through a TMA descriptor
        "a.stride(0) % 16 == 0",
        "a.stride(0) >= k",
    ),
    "deterministic": True,
}
# By what the host knows: the rows of an average expert, and the most units of work (64 rows of a
# weight times a tile of rows of a) that there can be.
VARIANTS = {
    "K 256, few rows": "k == 256 >= 64 * (m // num_experts)",  # up to 4 an expert
    "K 256, some rows": "k == 256 >= 9 * (m // num_experts)",  # up to 28
    "K 256, many rows": "k == 256",
    "up to 4 blocks share a unit": "m * n <= 8192",
    "up to 2 blocks share a unit": "m * n <= 16896",
    "some rows": "m // num_experts <= 26",
    "many rows": "m // num_experts > 26",
}


class Variant(NamedTuple):
    """The macros of a kernel; the source explains them."""

    warpgroups: int
    stages: int
    ctas_per_sm: int
    min_tile: int
    tile_step: int
    max_tile: int
    consumer_registers: int = 0
    cluster: int = 1
    short_k: int = 0

    @property
    def tiles(self) -> range:
        """Sizes of a tile."""
        return range(self.min_tile, self.max_tile + 1, self.tile_step)

    @property
    def threads(self) -> int:
        """Threads of a block: consumers, and a warp or a warpgroup of which one copies."""
        return 128 * self.warpgroups + (128 if self.consumer_registers else 32)

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory: stages, tiles that stay, results on their way out."""
        tile, results = 128 * self.max_tile, 144 * self.max_tile * self.warpgroups
        if self.short_k:
            return 4 * tile + self.stages * 2 * 4224 + results
        return self.stages * (tile + 4224 * self.warpgroups) + results


SHORT_FEW = Variant(2, 10, 2, 8, 8, 8, short_k=1)
SHORT_SOME = Variant(1, 4, 3, 8, 8, 32, short_k=1)
SHORT_MANY = Variant(2, 8, 1, 32, 16, 160, consumer_registers=232, short_k=1)
SHARED_BY_4 = Variant(1, 10, 2, 8, 8, 8, cluster=4)
SHARED_BY_2 = Variant(1, 7, 4, 8, 8, 8, cluster=2)
SOME = Variant(1, 5, 4, 8, 8, 32)
MANY = Variant(2, 6, 1, 32, 16, 160, consumer_registers=232)
KERNELS = (SHORT_FEW, SHORT_SOME, SHORT_MANY, SHARED_BY_4, SHARED_BY_2, SOME, MANY)


def variant(m: int, n: int, k: int, num_experts: int) -> Variant:
    """Return what runs for a call's sizes; VARIANTS says the same."""
    rows = m // num_experts
    if k == 256:
        return SHORT_FEW if rows <= 4 else SHORT_SOME if rows <= 28 else SHORT_MANY
    if m * n <= 16896:
        return SHARED_BY_4 if m * n <= 8192 else SHARED_BY_2
    return SOME if rows <= 26 else MANY


@functools.cache
def kernel(chosen: Variant) -> _cpp.Kernel:
    """Return the kernel of a variant; it is compiled when it is first called."""
    name = "w4a8_grouped_gemm"
    return _cpp.Kernel(
        f"{name}.cu", name, (f"{128 * len(chosen.tiles)}s", *"PPPP", *"iii"),
        block=chosen.threads, shared=chosen.shared, pdl=True, cluster=chosen.cluster, arch="sm90a",
        defines={macro.upper(): value for macro, value in chosen._asdict().items()},
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _plan(device: int, m: int, n: int, k: int, num_experts: int) -> tuple[Variant, int]:
    """Return the variant for a call's sizes, and its blocks: as many as run at once."""
    chosen = variant(m, n, k, num_experts)
    clusters = _cpp.num_sms(device) * chosen.ctas_per_sm // chosen.cluster
    return chosen, clusters * chosen.cluster


@functools.lru_cache(maxsize=1024)
def _rows_of_a(address: int, m: int, k: int, stride: int, tiles: range) -> bytes:
    """Describe the rows of a to TMA, once for each size of a tile."""
    return b"".join(
        _driver.tensor_map(address, 0, (k, m), (stride,), (128, rows), swizzle=3, promotion=3)
        for rows in tiles
    )


def w4a8_grouped_gemm(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    expert_offsets: Tensor,
) -> Tensor:
    m, n, k, num_experts, _ = spec.sizes(a, a_scale, b, b_scale, expert_offsets)
    if m == 0:
        return spec.outputs(a, a_scale, b, b_scale, expert_offsets)
    device = a.get_device()
    chosen, blocks = _plan(device, m, n, k, num_experts)
    rows = empty(a, (m, n), torch.bfloat16)
    kernel(chosen)(
        device,
        blocks,
        _rows_of_a(a.data_ptr(), m, k, a.stride(0), chosen.tiles),
        b.data_ptr(),
        a_scale.data_ptr(),
        expert_offsets.data_ptr(),
        rows.data_ptr(),
        num_experts,
        n,
        k,
    )
    return rows

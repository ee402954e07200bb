"""Marlin's grouped GEMM as SGLang has it: bfloat16 activations times the same int4 weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hwfuse._bench.peers import Missing, load
from hwfuse.packing import deinterleave_scales

_OPS = "sglang.kernels.ops"
_BLOCKS = (8, 16, 32, 48, 64)  # rows of an expert that are computed together
# By address: the last weight, which is kept so that no other gets its address, and what it became.
_packed: dict[int, tuple[Tensor, Tensor, Tensor]] = {}


def grouped_gemm(arguments: Mapping[str, Any]) -> Callable[[], Any]:
    """Repack the weight, as SGLang does when a model is loaded, and plan the blocks of rows."""
    function = load(f"{_OPS}.moe.moe_wna16_marlin").moe_wna16_marlin_gemm
    kind = load("sgl_kernel.scalar_type").scalar_types.uint4b8
    b, offsets = arguments["b"], arguments["expert_offsets"].tolist()
    if b.shape[1] % 64:
        raise Missing("it needs n a multiple of 64")
    a = (arguments["a"].float() * arguments["a_scale"]).bfloat16()
    weight, scale = _repacked(b, arguments["b_scale"])
    (rows, k), n = a.shape, b.shape[1]
    block = next((size for size in _BLOCKS if rows / len(b) / size < 0.9), _BLOCKS[-1])
    ids, experts = _blocks(offsets, rows, block)
    sorted_ids, expert_ids, padded, workspace = (
        torch.tensor(values, dtype=torch.int32, device=a.device)
        for values in (ids, experts, [len(ids)], [0] * 4 * _num_processors(a.device))
    )
    ones = torch.ones(rows, 1, device=a.device)

    def call() -> Any:
        out = a.new_empty((rows, n))
        function(
            a, out, weight, None, scale, None, None, None, None, workspace, sorted_ids, expert_ids,
            padded, ones, moe_block_size=block, top_k=1, mul_topk_weights=False, is_ep=False,
            b_q_type=kind, size_m=rows, size_n=n, size_k=k, use_atomic_add=True,
            use_fp32_reduce=True,
        )  # fmt: skip
        return out

    return call


def _num_processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _blocks(offsets: list[int], num_rows: int, block: int) -> tuple[list[int], list[int]]:
    """Return the rows block by block, filled up with *num_rows*, and the expert of each block."""
    ids: list[int] = []
    experts: list[int] = []
    for expert, (start, end) in enumerate(itertools.pairwise(offsets)):
        for first in range(start, end, block):
            used = range(first, min(first + block, end))
            ids += [*used, *[num_rows] * (block - len(used))]
            experts.append(expert)
    return ids, experts


def _repacked(b: Tensor, b_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight and scale in Marlin's layouts."""
    address = b.data_ptr()
    if address not in _packed:
        repack = load(f"{_OPS}.quantization.gptq_marlin_repack").gptq_marlin_repack
        _packed.clear()
        n, k = b.shape[1], b.shape[2] * 2
        no_order = torch.empty(0, dtype=torch.int32, device=b.device)
        # GPTQ: eight numbers, each plus 8, of one column to an int32.
        words = (b ^ -120).view(torch.int32)
        weight = torch.stack([repack(w.t().contiguous(), no_order, k, n, 4) for w in words])
        scales = torch.stack([deinterleave_scales(s, num_rows=n).t() for s in b_scale])
        by_eight = scales.reshape(-1, 8, 8).transpose(1, 2).reshape(scales.shape).contiguous()
        _packed[address] = b, weight, by_eight
    return _packed[address][1:]

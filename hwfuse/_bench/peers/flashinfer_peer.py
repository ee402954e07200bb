"""FlashInfer's norms of its CUDA module; https://github.com/flashinfer-ai/flashinfer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hwfuse._bench.peers import ROUNDED_TWICE, Missing, Registry, load

registry = Registry("flashinfer")


@registry.add(
    "add_rms_norm_fp8_group_quant", "add_rms_norm_and_fp8_group_quant",
    name="fused_add_rmsnorm_fp8_block_quant", note="also writes the norm in bfloat16",
    tolerance=ROUNDED_TWICE,
)  # fmt: skip
def add_norm_quant(arguments: Mapping[str, Any]) -> Callable[[], Any]:
    """Use the fused kernel; it adds into the residual."""
    norm = load("flashinfer.norm")
    if not hasattr(norm, "fused_add_rmsnorm_fp8_block_quant"):
        raise Missing("this release has no fused_add_rmsnorm_fp8_block_quant")
    x, weight, eps = (arguments[name] for name in ("x", "weight", "eps"))
    residual = arguments["residual"].clone()
    m, k = x.shape

    def call() -> tuple[Tensor, ...]:
        q = x.new_empty((m, k), dtype=torch.float8_e4m3fn)
        scale = x.new_empty((k // 128, -(-m // 4) * 4), dtype=torch.float32)
        normed = x.new_empty((m, k))
        norm.fused_add_rmsnorm_fp8_block_quant(q, scale, normed, x, residual, weight, eps)
        return q, scale.t()[:m], residual, normed

    return call

"""PyTorch's own operators.  Its eager composition of the other ops is reference/torch itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hwfuse import layouts
from hwfuse._bench.peers import Missing, Registry

registry = Registry("torch")


@registry.add("fused_qkvbfg", name="linear + bmm")
def linear_and_bmm(arguments: Mapping[str, Any]) -> Callable[[], Any]:
    """Merge the weights, as `pack_kda` does, and use cuBLAS twice."""
    x, weight, w_fg = (arguments[name] for name in ("x", "w_qkvbfg", "w_fg"))
    return lambda: kda(x, weight, w_fg)


def kda(x: Tensor, weight: Tensor, w_fg: Tensor) -> tuple[Tensor, Tensor]:
    """Project in two products of the tensors' own dtype."""
    rank = w_fg.shape[2]
    qkvbfg = F.linear(x, weight)
    low_ranks = qkvbfg[:, -2 * rank :].unflatten(1, (2, rank)).transpose(0, 1)
    return qkvbfg, torch.bmm(low_ranks, w_fg.mT)


@registry.add("fp8_blockscale_gemm", name="scaled_mm")
def scaled_mm(arguments: Mapping[str, Any]) -> Callable[[], Any]:
    """Use cuBLASLt's product of blocks 1x128 and 128x128."""
    if not hasattr(F, "scaled_mm"):
        raise Missing(f"torch {torch.__version__} has no F.scaled_mm")
    kinds: Any = F.ScalingType
    a, b = arguments["a"], arguments["b"]
    a_scale = layouts.convert(arguments["a_scale"], "column")
    b_scale = arguments["b_scale"].t()

    def call() -> Any:
        return F.scaled_mm(
            a, b.t(), a_scale, kinds.BlockWise1x128, b_scale, kinds.BlockWise128x128,
            output_dtype=arguments["out_dtype"],
        )  # fmt: skip

    return call

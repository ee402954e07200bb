"""fp8_group_quant: the Triton kernel that ROCm runs too."""

import torch
from torch import Tensor

from hwfuse_triton import group_quant as shared
from hwfuse_triton._replay import replayed

REQUIRES = {"deterministic": True, "batch_invariant": True}
VARIANTS = {
    "groups in registers": "group_size <= 32768",
    "groups in pieces": "group_size > 32768",
}


@replayed
def fp8_group_quant(
    x: Tensor,
    *,
    group_size: int = 128,
    scale_layout: str = "row",
    scale_format: str = "fp32",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    return shared.fp8_group_quant(
        x,
        group_size=group_size,
        scale_layout=scale_layout,
        scale_format=scale_format,
        dtype=dtype,
    )

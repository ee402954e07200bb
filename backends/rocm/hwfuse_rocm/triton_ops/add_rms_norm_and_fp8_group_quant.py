"""add_rms_norm_and_fp8_group_quant: the Triton kernel that CUDA runs too."""

import torch
from torch import Tensor

from hwfuse_triton import norm_group_quant as shared
from hwfuse_triton._replay import replayed

REQUIRES = {"deterministic": True}  # the order of the sum depends on m and strides
VARIANTS = {
    "rows in pieces": "num_groups * group_size > 32768",  # no row fits the registers of a program
    "rows in registers": "num_groups * group_size <= 32768",
}


@replayed
def add_rms_norm_and_fp8_group_quant(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    group_size: int = 128,
    scale_layout: str = "row",
    scale_format: str = "fp32",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return shared.add_rms_norm_and_fp8_group_quant(
        x,
        residual,
        weight,
        eps=eps,
        group_size=group_size,
        scale_layout=scale_layout,
        scale_format=scale_format,
        dtype=dtype,
        wave=64,
    )

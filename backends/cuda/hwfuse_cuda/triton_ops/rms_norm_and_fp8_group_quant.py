"""rms_norm_and_fp8_group_quant: the Triton kernel that ROCm runs too."""

import torch
from torch import Tensor

from hwfuse_triton import norm_group_quant as shared
from hwfuse_triton._replay import replayed

REQUIRES = {"deterministic": True}  # the order of the sum depends on m and strides
VARIANTS = {
    "rows in pieces": "num_groups * group_size > 32768",  # no row fits the registers of a program
    "many warps a row": "m * k <= 8388608",
    "few warps a row": "m * k > 8388608",
}


@replayed
def rms_norm_and_fp8_group_quant(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    group_size: int = 128,
    scale_layout: str = "row",
    scale_format: str = "fp32",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return shared.rms_norm_and_fp8_group_quant(
        x,
        weight,
        eps=eps,
        group_size=group_size,
        scale_layout=scale_layout,
        scale_format=scale_format,
        dtype=dtype,
    )

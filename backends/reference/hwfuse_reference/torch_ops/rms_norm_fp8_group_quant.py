"""Reference of rms_norm_fp8_group_quant."""

from __future__ import annotations

import torch
from torch import Tensor

from hwfuse.ops import rms_norm_fp8_group_quant as spec
from hwfuse_reference.torch_ops.fp8_group_quant import fp8_group_quant

REQUIRES = {"deterministic": True}


def rms_norm_fp8_group_quant(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    group_size: int = 128,
    scale_layout: str = "row",
    scale_format: str = "fp32",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    spec.sizes(
        x,
        weight,
        eps=eps,
        group_size=group_size,
        scale_layout=scale_layout,
        scale_format=scale_format,
        dtype=dtype,
    )
    return fp8_group_quant(
        norm_rows(x.float(), weight, eps),
        group_size=group_size,
        scale_layout=scale_layout,
        scale_format=scale_format,
        dtype=dtype,
    )


def norm_rows(t: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the weighted norm of float32 rows, in float32."""
    return t * (t.square().mean(dim=1, keepdim=True) + eps).rsqrt() * weight.float()

"""Reference of add_rms_norm_fp8_group_quant."""

from __future__ import annotations

import torch
from torch import Tensor

from hwfuse.ops import add_rms_norm_fp8_group_quant as spec
from hwfuse_reference.torch_ops.fp8_group_quant import fp8_group_quant
from hwfuse_reference.torch_ops.rms_norm_fp8_group_quant import norm_rows

REQUIRES = {"deterministic": True}


def add_rms_norm_fp8_group_quant(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    group_size: int = 128,
    scale_layout: str = "row",
    scale_format: str = "fp32",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    spec.sizes(
        x,
        residual,
        weight,
        eps=eps,
        group_size=group_size,
        scale_layout=scale_layout,
        scale_format=scale_format,
        dtype=dtype,
    )
    t = x.float() + residual.float()
    q, scale = fp8_group_quant(
        norm_rows(t, weight, eps),
        group_size=group_size,
        scale_layout=scale_layout,
        scale_format=scale_format,
        dtype=dtype,
    )
    return q, scale, t.to(x.dtype)

"""Reference of rms_norm_and_fp8_group_quant."""

from __future__ import annotations

import torch
from torch import Tensor

from hwfuse.ops import rms_norm_and_fp8_group_quant as spec
from hwfuse_reference.torch_ops.fp8_group_quant import fp8_group_quant
from hwfuse_reference.torch_ops.rms_norm_fp8_group_quant import norm_rows

REQUIRES = {"deterministic": True}


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
    spec.sizes(
        x,
        weight,
        eps=eps,
        group_size=group_size,
        scale_layout=scale_layout,
        scale_format=scale_format,
        dtype=dtype,
    )
    y = norm_rows(x.float(), weight, eps)
    q, scale = fp8_group_quant(
        y,
        group_size=group_size,
        scale_layout=scale_layout,
        scale_format=scale_format,
        dtype=dtype,
    )
    return q, scale, y.to(x.dtype)

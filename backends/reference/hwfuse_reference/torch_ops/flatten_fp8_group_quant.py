"""Reference of flatten_fp8_group_quant."""

from __future__ import annotations

import torch
from torch import Tensor

from hwfuse.ops import flatten_fp8_group_quant as spec
from hwfuse_reference.torch_ops.fp8_group_quant import fp8_group_quant

REQUIRES = {"deterministic": True}


def flatten_fp8_group_quant(
    x: Tensor,
    *,
    group_size: int = 128,
    scale_layout: str = "row",
    scale_format: str = "fp32",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    spec.sizes(
        x,
        group_size=group_size,
        scale_layout=scale_layout,
        scale_format=scale_format,
        dtype=dtype,
    )
    return fp8_group_quant(
        x.flatten(1),
        group_size=group_size,
        scale_layout=scale_layout,
        scale_format=scale_format,
        dtype=dtype,
    )

"""Reference of silu_mul_fp8_group_quant."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hwfuse.ops import silu_mul_fp8_group_quant as spec
from hwfuse_reference.torch_ops.fp8_group_quant import fp8_group_quant

REQUIRES = {"deterministic": True}


def silu_mul_fp8_group_quant(
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
        silu_mul(x),
        group_size=group_size,
        scale_layout=scale_layout,
        scale_format=scale_format,
        dtype=dtype,
    )


def silu_mul(x: Tensor) -> Tensor:
    """Return ``silu(gate) * up`` of rows ``[gate | up]``, in float32."""
    gate, up = x.float().chunk(2, dim=1)
    return F.silu(gate) * up

"""add_rms_norm_fp8_group_quant: aiter's Triton kernel.

Experimental for the reason that rms_norm_fp8_group_quant gives.
"""

import torch
from torch import Tensor

from hwfuse import layouts
from hwfuse.ops import add_rms_norm_fp8_group_quant as spec
from hwfuse_rocm import _aiter

REQUIRES = {
    "arch": ("gfx942", "gfx950"),
    "facts": (
        "group_size in (32, 64, 128)",
        "scale_layout in ('row', 'column')",
        "scale_format == 'fp32'",
        "(dtype == float8_e4m3fnuz) == (arch == gfx942)",
    ),
    "experimental": True,
}


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
    options = {
        "eps": eps,
        "group_size": group_size,
        "scale_layout": scale_layout,
        "scale_format": scale_format,
        "dtype": dtype,
    }
    m, k, _ = spec.sizes(x, residual, weight, **options)
    if m == 0:
        return spec.outputs(x, residual, weight, **options)
    _aiter.check_reach("x", x)
    _aiter.check_reach("residual", residual)
    _aiter.check_size("x", m, k)
    is_column = scale_layout == "column"
    (q, scale), _, _, residual_out = _aiter.function("fused_rms_fp8_group_quant")(
        x,
        weight,
        eps,
        group_size=group_size,
        dtype_quant=dtype,
        res1=residual,
        transpose_scale=is_column,
    )
    return q, layouts.from_aiter_legacy(scale) if is_column else scale, residual_out

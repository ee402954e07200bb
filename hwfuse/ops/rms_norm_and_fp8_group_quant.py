"""Spec of rms_norm_and_fp8_group_quant: rms_norm_fp8_group_quant that returns the norm, too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hwfuse.ops import rms_norm_fp8_group_quant as without_norm

DIMS = without_norm.DIMS
Sizes = without_norm.Sizes
sizes = without_norm.sizes
make_inputs = without_norm.make_inputs


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
    """Do as `rms_norm_fp8_group_quant` and return the norm in x's dtype, too.

    For layers of which some weights are fp8 and others are not.

    Shapes: M rows of K elements in G = K / group_size groups.

    Args:
        x: ``[M, K]``, bfloat16, float16 or float32.  Elements of a row side by side, row stride
            free.
        weight: ``[K]``, bfloat16, float16 or float32.  The plain factor w, not 1 + w.
        eps: added to the mean square.
        group_size: elements per group; K is a multiple of it.
        scale_layout: ``"row"``, ``"column"`` or ``"column_tma"``, see `hwfuse.layouts`.
        scale_format: ``"fp32"``, ``"ue8m0"`` or ``"ue8m0_packed"``, see `hwfuse.layouts`.
        dtype: float8_e4m3fn or float8_e4m3fnuz; None means the one of x's device
            (`hwfuse.fp8_dtype`).

    Returns:
        q: ``[M, K]`` of *dtype*, contiguous.
        scale: the factor that restores the norm: ``norm ≈ q * scale``.  ``[M, G]`` float32, or
            ``[M, ceil(G/4)]`` int32 when packed.  Strides as *scale_layout* says.
        norm: ``[M, K]``, dtype of *x*, contiguous: y, rounded once.

    Raises:
        InputError: as `rms_norm_fp8_group_quant`.

    Empty input: M = 0 gives empty outputs.

    Formula: that of `rms_norm_fp8_group_quant`; ``norm = round(y)``, while q and scale are of the y
    that is not rounded.

    Gradient: none, inference only.

    Source: aiter ``fused_rms_fp8_group_quant`` with ``output_unquantized_inp1``.
    """
    raise NotImplementedError


def outputs(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    group_size: int = 128,
    scale_layout: str = "row",
    scale_format: str = "fp32",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the results, uninitialised."""
    quantised = without_norm.outputs(
        x,
        weight,
        eps=eps,
        group_size=group_size,
        scale_layout=scale_layout,
        scale_format=scale_format,
        dtype=dtype,
    )
    return *quantised, x.new_empty(x.shape)


# The norm has the last bits of the sum of squares, too: float16 and bfloat16 take the neighbouring
# number rarely; a second rounding moves a quarter of them.  (In float32 it differs throughout.)
COMPARE: dict[str, tuple[str, dict[str, Any]]] = {
    **without_norm.COMPARE,
    "norm": ("ulps", {"max_ulps": 1, "share": 1e-3}),
}

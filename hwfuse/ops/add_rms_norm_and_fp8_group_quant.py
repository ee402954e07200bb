"""Spec of add_rms_norm_and_fp8_group_quant: add_rms_norm_fp8_group_quant and the norm, too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hwfuse.ops import add_rms_norm_fp8_group_quant as without_norm
from hwfuse.ops import rms_norm_and_fp8_group_quant as without_add

DIMS = without_norm.DIMS
Sizes = without_norm.Sizes
sizes = without_norm.sizes
make_inputs = without_norm.make_inputs


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
    """Do as `add_rms_norm_fp8_group_quant` and return the norm in x's dtype, too.

    For layers of which some weights are fp8 and others are not.

    Shapes: M rows of K elements in G = K / group_size groups.

    Args:
        x: ``[M, K]``, bfloat16, float16 or float32.  Elements of a row side by side, row stride
            free.
        residual: ``[M, K]``, dtype of *x*, strides as *x*.
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
        residual_out: ``[M, K]``, dtype of *x*, contiguous: the sum, rounded once.
        norm: ``[M, K]``, dtype of *x*, contiguous: y, rounded once.

    Raises:
        InputError: as `add_rms_norm_fp8_group_quant`.

    Empty input: M = 0 gives empty outputs.

    Formula: that of `add_rms_norm_fp8_group_quant`; ``norm = round(y)``, while q and scale are of
    the y that is not rounded.

    Gradient: none, inference only.

    Source: aiter ``fused_rms_fp8_group_quant`` with ``res1`` and ``output_unquantized_inp1``.
    """
    raise NotImplementedError


def outputs(
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
    """Allocate the results, uninitialised."""
    others = without_norm.outputs(
        x,
        residual,
        weight,
        eps=eps,
        group_size=group_size,
        scale_layout=scale_layout,
        scale_format=scale_format,
        dtype=dtype,
    )
    return *others, x.new_empty(x.shape)


COMPARE: dict[str, tuple[str, dict[str, Any]]] = {
    **without_norm.COMPARE,
    "norm": without_add.COMPARE["norm"],
}

"""Spec of add_rms_norm_fp8_group_quant: add the residual, then rms_norm_fp8_group_quant."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hwfuse import _group_quant
from hwfuse._checks import check, same_device
from hwfuse._errors import InputError
from hwfuse._random import Random
from hwfuse.ops import rms_norm_fp8_group_quant as without_add

DIMS = {"x": "m k", "residual": "m k", "weight": "k"}
Sizes = _group_quant.Sizes


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
    """Add a residual to *x*, then do as `rms_norm_fp8_group_quant`; the sum is returned, too.

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

    Raises:
        InputError: as `rms_norm_fp8_group_quant`, or a residual of another shape or dtype than x.

    Empty input: M = 0 gives empty outputs.

    Formula: ``t = x + residual`` in float32, ``residual_out = round(t)``; then
    `rms_norm_fp8_group_quant` of the t that is not rounded.

    Gradient: none, inference only.

    Source: aiter ``fused_rms_fp8_group_quant`` with ``res1``.
    """
    raise NotImplementedError


def sizes(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    group_size: int = 128,
    scale_layout: str = "row",
    scale_format: str = "fp32",
    dtype: torch.dtype | None = None,
) -> Sizes:
    """Check a call and return its sizes."""
    result = without_add.sizes(
        x,
        weight,
        eps=eps,
        group_size=group_size,
        scale_layout=scale_layout,
        scale_format=scale_format,
        dtype=dtype,
    )
    check("residual", residual, 2, (x.dtype,))
    if residual.shape != x.shape:
        raise InputError("residual.shape", tuple(residual.shape), f"{tuple(x.shape)}, as x")
    same_device("residual", residual, "x", x)
    return result


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the results, uninitialised."""
    m, k, _ = sizes(
        x,
        residual,
        weight,
        eps=eps,
        group_size=group_size,
        scale_layout=scale_layout,
        scale_format=scale_format,
        dtype=dtype,
    )
    quantised = _group_quant.empty(x, m, k, group_size, scale_layout, scale_format, dtype)
    return *quantised, x.new_empty((m, k))


def make_inputs(
    *,
    m: int = 64,
    k: int = 7168,
    eps: float = 1e-6,
    group_size: int = 128,
    scale_layout: str = "row",
    scale_format: str = "fp32",
    fp8: torch.dtype | None = None,
    row_pad: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    weight_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Return one call's arguments; *dtype* is x's, *fp8* the results'."""
    inputs = without_add.make_inputs(
        m=m,
        k=k,
        eps=eps,
        group_size=group_size,
        scale_layout=scale_layout,
        scale_format=scale_format,
        fp8=fp8,
        row_pad=row_pad,
        dtype=dtype,
        weight_dtype=weight_dtype,
        device=device,
        seed=seed,
    )
    residual = Random(seed + 1, device).rows(m, k, row_pad=row_pad, dtype=dtype)
    return {"x": inputs.pop("x"), "residual": residual, **inputs}


# The sum is one addition and one rounding: exact.
COMPARE: dict[str, tuple[str, dict[str, Any]]] = {
    **without_add.COMPARE,
    "residual_out": ("ulps", {"max_ulps": 0, "share": 0.0}),
}

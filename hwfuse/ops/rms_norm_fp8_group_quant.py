"""Spec of rms_norm_fp8_group_quant: RMSNorm whose result is rounded once, to fp8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hwfuse import _group_quant
from hwfuse._checks import check, same_device
from hwfuse._errors import InputError

DIMS = {"x": "m k", "weight": "k"}
Sizes = _group_quant.Sizes


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
    """Normalise each row to root mean square 1, weight it, and quantise it as `fp8_group_quant`.

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

    Raises:
        InputError: K is not a positive multiple of group_size, an option that `fp8_group_quant`
            refuses, a weight of another length, or an argument of another rank, dtype, device or
            last stride.

    Empty input: M = 0 gives empty outputs.

    Formula: ``y = x * rsqrt(mean(x**2) + eps) * w`` in float32; then `fp8_group_quant` of the
    float32 y.  So y is rounded once, from float32 to fp8.  A chain of a norm that rounds y to x's
    dtype and `fp8_group_quant` differs: scales by up to 2**-8 of themselves, a few per cent of the
    codes by one.
    A NaN makes its whole row NaN.  With an infinity, finite elements of its row have y = 0 and its
    own y is NaN.

    Gradient: none, inference only.

    Source: aiter ``fused_rms_fp8_group_quant``.
    """
    raise NotImplementedError


def sizes(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    group_size: int = 128,
    scale_layout: str = "row",
    scale_format: str = "fp32",
    dtype: torch.dtype | None = None,
) -> Sizes:
    """Check a call and return its sizes."""
    result = _group_quant.check_rows(x, group_size, scale_layout, scale_format, dtype)
    check("weight", weight, 1, _group_quant.DTYPES)
    if weight.shape[0] != result.k:
        raise InputError("weight.shape[0]", weight.shape[0], f"{result.k}, the width of x")
    same_device("weight", weight, "x", x)
    return result


def outputs(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    group_size: int = 128,
    scale_layout: str = "row",
    scale_format: str = "fp32",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Allocate the results, uninitialised."""
    m, k, _ = sizes(
        x,
        weight,
        eps=eps,
        group_size=group_size,
        scale_layout=scale_layout,
        scale_format=scale_format,
        dtype=dtype,
    )
    return _group_quant.empty(x, m, k, group_size, scale_layout, scale_format, dtype)


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
    from hwfuse._random import Random

    random = Random(seed, device)
    return {
        "x": _group_quant.make_rows(
            random, m, k, group_size=group_size, row_pad=row_pad, dtype=dtype
        ),
        "weight": random.normal(k, dtype=weight_dtype or dtype),
        "eps": eps,
        "group_size": group_size,
        "scale_layout": scale_layout,
        "scale_format": scale_format,
        "dtype": fp8,
    }


# The sum of squares may be taken in any order and rsqrt be off by some ulps: a few 1e-6 relative,
# which moves few y across the middle between two codes.  Rounding y, or x plus a residual, to
# bfloat16 first moves the scale by up to 2**-8, 30,000 ulps.
COMPARE: dict[str, tuple[str, dict[str, Any]]] = {
    "q": ("fp8_codes", {"max_codes": 1, "share": 1e-3}),
    "scale": ("ulps", {"max_ulps": 64, "share": 1.0}),
}

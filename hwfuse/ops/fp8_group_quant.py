"""Spec of fp8_group_quant: quantise rows to fp8, one scale per group of elements."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hwfuse import _group_quant

DIMS = {"x": "m k"}
Sizes = _group_quant.Sizes


def fp8_group_quant(
    x: Tensor,
    *,
    group_size: int = 128,
    scale_layout: str = "row",
    scale_format: str = "fp32",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantise *x* to fp8 with one scale for each group of consecutive elements of a row.

    Shapes: M rows of K elements in G = K / group_size groups.  QMAX is the largest finite number of
    the fp8 type: 448 for float8_e4m3fn, 240 for float8_e4m3fnuz.

    Args:
        x: ``[M, K]``, bfloat16, float16 or float32.  Elements of a row side by side, row stride
            free.
        group_size: elements per group; K is a multiple of it.
        scale_layout: ``"row"``, ``"column"`` or ``"column_tma"``: the strides of the scale, see
            `hwfuse.layouts`.
        scale_format: ``"fp32"``; ``"ue8m0"``, powers of two in float32; or ``"ue8m0_packed"``, the
            exponents of those, four to an int32, only in ``"column_tma"``.
        dtype: float8_e4m3fn or float8_e4m3fnuz; None means the one of x's device
            (`hwfuse.fp8_dtype`).

    Returns:
        q: ``[M, K]`` of *dtype*, contiguous.
        scale: the factor that restores x: ``x ≈ q * scale``.  ``[M, G]`` float32, or
            ``[M, ceil(G/4)]`` int32 when packed: group 4i+b in byte b, bytes past G are 0.  Strides
            as *scale_layout* says.

    Raises:
        InputError: K is not a positive multiple of group_size, a layout, format or dtype that does
            not exist, a packed scale in a layout other than column_tma, or an x of another rank,
            dtype or last stride.

    Empty input: M = 0 gives empty outputs.

    Formula: in float32, ``s = max(amax(|x|), 1e-10) / QMAX``;
    ``q = fp8(clamp(x * (1 / s), -QMAX, QMAX))``, rounded once, to nearest even.  The clamp is
    explicit: casts beyond the range give NaN on some types and versions, the limit on others.
    For the ue8m0 formats s is first rounded up to a power of two, in its bits; with the floor of
    1e-10 its exponent is always within 1..254.
    A NaN in a group makes its scale and all its codes NaN.  An infinity makes the scale infinite,
    the codes of finite elements 0 and its own code NaN.  A packed exponent is then 255.

    Gradient: none, inference only.

    Source: SGLang ``per_token_group_quant_fp8``, aiter ``per_group_quant_hip``, DeepGEMM's
    ``per_token_cast_to_fp8`` for the scale formats.
    """
    raise NotImplementedError


def sizes(
    x: Tensor,
    *,
    group_size: int = 128,
    scale_layout: str = "row",
    scale_format: str = "fp32",
    dtype: torch.dtype | None = None,
) -> Sizes:
    """Check a call and return its sizes."""
    return _group_quant.check_rows(x, group_size, scale_layout, scale_format, dtype)


def outputs(
    x: Tensor,
    *,
    group_size: int = 128,
    scale_layout: str = "row",
    scale_format: str = "fp32",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Allocate the results, uninitialised."""
    m, k, _ = sizes(
        x,
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
    group_size: int = 128,
    scale_layout: str = "row",
    scale_format: str = "fp32",
    fp8: torch.dtype | None = None,
    row_pad: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Return one call's arguments; *dtype* is x's, *fp8* the results'."""
    from hwfuse._random import Random

    return {
        "x": _group_quant.make_rows(
            Random(seed, device), m, k, group_size=group_size, row_pad=row_pad, dtype=dtype
        ),
        "group_size": group_size,
        "scale_layout": scale_layout,
        "scale_format": scale_format,
        "dtype": fp8,
    }


# x * (1/s) and x / s differ in the last bit of float32, which on rare ties is one fp8 code; the
# scale is one division, whose fast forms are off by an ulp or two (relative 1e-6 is eight).
COMPARE: dict[str, tuple[str, dict[str, Any]]] = {
    "q": ("fp8_codes", {"max_codes": 1, "share": 1e-3}),
    "scale": ("ulps", {"max_ulps": 8, "share": 1.0}),
}

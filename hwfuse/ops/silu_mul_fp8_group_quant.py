"""Spec of silu_mul_fp8_group_quant: a gated activation whose result goes to fp8 unrounded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hwfuse import _group_quant
from hwfuse._checks import check
from hwfuse._errors import InputError
from hwfuse._random import Random

DIMS = {"x": "m w"}
Sizes = _group_quant.Sizes


def silu_mul_fp8_group_quant(
    x: Tensor,
    *,
    group_size: int = 128,
    scale_layout: str = "row",
    scale_format: str = "fp32",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Multiply the second half of each row by the SiLU of the first, then `fp8_group_quant`.

    Shapes: M rows of 2K elements; results of K elements in G = K / group_size groups.

    Args:
        x: ``[M, 2K]``, bfloat16, float16 or float32: gate ``[K]``, then up ``[K]``.  Elements of a
            row side by side, row stride free.
        group_size: elements per group; K is a multiple of it.
        scale_layout: ``"row"``, ``"column"`` or ``"column_tma"``, see `hwfuse.layouts`.
        scale_format: ``"fp32"``, ``"ue8m0"`` or ``"ue8m0_packed"``, see `hwfuse.layouts`.
        dtype: float8_e4m3fn or float8_e4m3fnuz; None means the one of x's device
            (`hwfuse.fp8_dtype`).

    Returns:
        q: ``[M, K]`` of *dtype*, contiguous.
        scale: the factor that restores the product: ``y ≈ q * scale``.  ``[M, G]`` float32, or
            ``[M, ceil(G/4)]`` int32 when packed.  Strides as *scale_layout* says.

    Raises:
        InputError: the width of x is not a positive multiple of 2 * group_size, an option that
            `fp8_group_quant` refuses, or an x of another rank, dtype or last stride.

    Empty input: M = 0 gives empty outputs.

    Formula: ``y = gate / (1 + exp(-gate)) * up`` in float32; then `fp8_group_quant` of the float32
    y.  So y is rounded once, from float32 to fp8; neither the SiLU nor the product is rounded to
    x's dtype, as some kernels do.

    Gradient: none, inference only.

    Source: SGLang ``silu_and_mul`` with ``per_token_group_quant_fp8``, aiter
    ``fused_reduce_act_mul_fp8_group_quant``.
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
    check("x", x, 2, _group_quant.DTYPES)
    _group_quant.check_options(group_size, scale_layout, scale_format, dtype)
    m, width = x.shape
    if width % (2 * group_size) or not width:
        needed = f"a positive multiple of 2 * group_size = {2 * group_size}"
        raise InputError("x.shape[1]", width, needed)
    return Sizes(m, width // 2, width // (2 * group_size))


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
    k: int = 2048,
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
    return {
        "x": _group_quant.make_rows(
            Random(seed, device), m, 2 * k, group_size=group_size, row_pad=row_pad, dtype=dtype
        ),
        "group_size": group_size,
        "scale_layout": scale_layout,
        "scale_format": scale_format,
        "dtype": fp8,
    }


# The exp of hardware is off by a few 1e-7 of it, which moves few y across the middle between two
# codes; rounding the SiLU or the product to bfloat16 moves the scale by up to 2**-8, 30,000 ulps.
COMPARE: dict[str, tuple[str, dict[str, Any]]] = {
    "q": ("fp8_codes", {"max_codes": 1, "share": 1e-3}),
    "scale": ("ulps", {"max_ulps": 64, "share": 1.0}),
}

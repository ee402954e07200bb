"""Spec of flatten_fp8_group_quant: lay the heads of a token side by side and quantise the row."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hwfuse import _group_quant
from hwfuse._checks import check
from hwfuse._errors import InputError
from hwfuse._random import Random

DIMS = {"x": "m num_heads head_dim"}


def flatten_fp8_group_quant(
    x: Tensor,
    *,
    group_size: int = 128,
    scale_layout: str = "row",
    scale_format: str = "fp32",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Concatenate the heads of each token and quantise the row as `fp8_group_quant`.

    Shapes: M tokens of H heads of D elements; rows of K = H*D in G = K / group_size groups.  A
    group never holds elements of two heads: D is a multiple of group_size.

    Args:
        x: ``[M, H, D]``, bfloat16, float16 or float32.  Elements of a head side by side, the
            strides of tokens and heads free: also a transposed ``[H, M, D]``.
        group_size: elements per group; D is a multiple of it.
        scale_layout: ``"row"``, ``"column"`` or ``"column_tma"``, see `hwfuse.layouts`.
        scale_format: ``"fp32"``, ``"ue8m0"`` or ``"ue8m0_packed"``, see `hwfuse.layouts`.
        dtype: float8_e4m3fn or float8_e4m3fnuz; None means the one of x's device
            (`hwfuse.fp8_dtype`).

    Returns:
        q: ``[M, H*D]`` of *dtype*, contiguous: all of head 0, all of head 1, ….
        scale: the factor that restores x: ``x ≈ q * scale``.  ``[M, G]`` float32, or
            ``[M, ceil(G/4)]`` int32 when packed.  Strides as *scale_layout* says.

    Raises:
        InputError: no heads, D is not a positive multiple of group_size, an option that
            `fp8_group_quant` refuses, or an x of another rank, dtype or last stride.

    Empty input: M = 0 gives empty outputs.

    Formula: `fp8_group_quant` of ``x.flatten(1)``.

    Gradient: none, inference only.

    Source: aiter ``fused_flatten_fp8_group_quant``.
    """
    raise NotImplementedError


class Sizes(NamedTuple):
    """What follows from the shape of x."""

    m: int
    num_heads: int
    head_dim: int
    k: int
    num_groups: int


def sizes(
    x: Tensor,
    *,
    group_size: int = 128,
    scale_layout: str = "row",
    scale_format: str = "fp32",
    dtype: torch.dtype | None = None,
) -> Sizes:
    """Check a call and return its sizes."""
    check("x", x, 3, _group_quant.DTYPES)
    _group_quant.check_options(group_size, scale_layout, scale_format, dtype)
    m, num_heads, head_dim = x.shape
    if head_dim % group_size or not head_dim:
        needed = f"a positive multiple of group_size = {group_size}"
        raise InputError("x.shape[2]", head_dim, needed)
    if not num_heads:
        raise InputError("x.shape[1]", num_heads, "at least 1 head")
    k = num_heads * head_dim
    return Sizes(m, num_heads, head_dim, k, k // group_size)


def outputs(
    x: Tensor,
    *,
    group_size: int = 128,
    scale_layout: str = "row",
    scale_format: str = "fp32",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Allocate the results, uninitialised."""
    m, _, _, k, _ = sizes(
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
    num_heads: int = 16,
    head_dim: int = 128,
    is_heads_first: bool = False,
    group_size: int = 128,
    scale_layout: str = "row",
    scale_format: str = "fp32",
    fp8: torch.dtype | None = None,
    row_pad: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Return one call's arguments; *dtype* is x's, *fp8* the results'.

    With *is_heads_first* x is a transposed ``[H, M, D]``, as a product of one matrix per head gives
    it.
    """
    x = _group_quant.make_rows(
        Random(seed, device),
        m,
        num_heads * head_dim,
        group_size=group_size,
        row_pad=row_pad,
        dtype=dtype,
    ).unflatten(1, (num_heads, head_dim))
    return {
        "x": x.transpose(0, 1).contiguous().transpose(0, 1) if is_heads_first else x,
        "group_size": group_size,
        "scale_layout": scale_layout,
        "scale_format": scale_format,
        "dtype": fp8,
    }


# As fp8_group_quant, for the same reasons.
COMPARE: dict[str, tuple[str, dict[str, Any]]] = {
    "q": ("fp8_codes", {"max_codes": 1, "share": 1e-3}),
    "scale": ("ulps", {"max_ulps": 8, "share": 1.0}),
}

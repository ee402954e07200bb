"""Spec of fp8_group_quant: quantise rows to fp8, one scale per group of elements."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hwfuse import layouts
from hwfuse._checks import check
from hwfuse._device import fp8_dtype
from hwfuse._errors import InputError

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
DIMS = {"x": "m k"}


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


class Sizes(NamedTuple):
    """What follows from the shape of x."""

    m: int
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
    check("x", x, 2, DTYPES)
    layouts.check(scale_layout, scale_format)
    if dtype is not None and dtype not in FP8_DTYPES:
        raise InputError("dtype", dtype, " or ".join(map(str, FP8_DTYPES)))
    if group_size < 1:
        raise InputError("group_size", group_size, "a positive number")
    m, k = x.shape
    num_groups = k // group_size
    if k % group_size or not num_groups:
        raise InputError("x.shape[1]", k, f"a positive multiple of group_size = {group_size}")
    return Sizes(m, k, num_groups)


def outputs(
    x: Tensor,
    *,
    group_size: int = 128,
    scale_layout: str = "row",
    scale_format: str = "fp32",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Allocate the results, uninitialised."""
    m, k, num_groups = sizes(
        x,
        group_size=group_size,
        scale_layout=scale_layout,
        scale_format=scale_format,
        dtype=dtype,
    )
    q = x.new_empty((m, k), dtype=dtype or fp8_dtype(x.device))
    scale = layouts.empty(
        m, num_groups, scale_layout=scale_layout, scale_format=scale_format, device=x.device
    )
    return q, scale


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
    """Return one call's arguments; *dtype* is x's, *fp8* the results'.

    Magnitudes differ from group to group, so that a scale in another's place shows.  From the
    second row on, every sixteenth row has in its first group: zeros, a NaN, an infinity, an
    outlier, or numbers below the floor of the scale.
    """
    from hwfuse._random import Random

    random = Random(seed, device)
    x = random.rows(m, k, row_pad=row_pad, dtype=dtype)
    exponents = random.integers(-6, 7, m, k // group_size, dtype=torch.float32)
    x *= exponents.exp2().repeat_interleave(group_size, dim=1).to(dtype)
    x[1::16, :group_size] = 0.0
    x[2::16, group_size // 2] = float("nan")
    x[3::16, group_size // 3] = -float("inf")
    x[4::16, group_size - 1] = 3e4
    x[5::16, :group_size] *= 2.0**-45
    return {
        "x": x,
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

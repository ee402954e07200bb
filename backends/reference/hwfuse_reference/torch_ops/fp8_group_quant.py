"""Reference of fp8_group_quant."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hwfuse.ops import fp8_group_quant as spec

REQUIRES = {"deterministic": True}

AMAX_FLOOR = 1e-10


def fp8_group_quant(
    x: Tensor,
    *,
    group_size: int = 128,
    scale_layout: str = "row",
    scale_format: str = "fp32",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    q, scale = spec.outputs(
        x,
        group_size=group_size,
        scale_layout=scale_layout,
        scale_format=scale_format,
        dtype=dtype,
    )
    qmax = torch.finfo(q.dtype).max
    groups = x.float().unflatten(1, (x.shape[1] // group_size, group_size))
    s = group_scale(groups, qmax)
    if scale_format != "fp32":
        s = power_of_two_above(s)
    codes = (groups * (1 / s).unsqueeze(2)).clamp(-qmax, qmax)
    q.copy_(codes.flatten(1))
    scale.copy_(pack_exponents(s) if scale_format == "ue8m0_packed" else s)
    return q, scale


def group_scale(groups: Tensor, qmax: float) -> Tensor:
    """Return ``max(amax, floor) / qmax`` over the last dimension; NaN and infinity pass through."""
    amax = groups.abs().amax(dim=2).clamp(min=AMAX_FLOOR)
    # Divide by a tensor: on a GPU torch turns division by a number into multiplication by 1/448,
    # and an amax of exactly 448 * 2**i would round up to the next power of two.
    return amax / amax.new_full((), qmax)


def power_of_two_above(s: Tensor) -> Tensor:
    """Round positive numbers up to powers of two; exact powers, infinity and NaN stay.

    In the bits, because log2 is inexact at powers of two: adding a full mantissa carries into the
    exponent unless the mantissa is 0.
    """
    rounded = (s.view(torch.int32) + 0x7FFFFF) & 0x7F800000
    return torch.where(s.isfinite(), rounded.view(torch.float32), s)


def pack_exponents(s: Tensor) -> Tensor:
    """Return the exponent bytes of ``[M, G]`` as int32 ``[M, ceil(G/4)]``, padded with bytes 0."""
    exponents = ((s.view(torch.int32) >> 23) & 0xFF).to(torch.uint8)
    return F.pad(exponents, (0, -s.shape[1] % 4)).view(torch.int32)

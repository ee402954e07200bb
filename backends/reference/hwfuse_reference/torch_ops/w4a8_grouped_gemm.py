"""Reference of w4a8_grouped_gemm."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from hwfuse.ops import w4a8_grouped_gemm as spec
from hwfuse.packing import deinterleave_scales, unpack_w4a8

REQUIRES = {"deterministic": True}

_BLOCK = 1 << 19  # bytes of packed weight that are unpacked at a time: 4 MiB of float32


def w4a8_grouped_gemm(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    expert_offsets: Tensor,
) -> Tensor:
    rows = spec.outputs(a, a_scale, b, b_scale, expert_offsets)
    step = max(1, _BLOCK // (a.shape[1] // 2))
    offsets = expert_offsets.tolist()
    rows[offsets[-1] :] = torch.nan  # unspecified; shows when a consumer reads it
    for e, (start, end) in enumerate(itertools.pairwise(offsets)):
        # Not one grouped product: the weights of one layer are gigabytes in float32.  Blocks that
        # stay in cache are 2 to 4 times as fast as whole experts; empty experts cost nothing.
        if start < end:
            x = a[start:end].float()
            even, odd = x[:, 0::2].contiguous(), x[:, 1::2].contiguous()
            weight, scales = _plain(b, b_scale, e)
            parts = weight.split(step), scales.split(step), rows[start:end].split(step, dim=1)
            for packed, scale, out in zip(*parts, strict=True):
                low, high = unpack(packed, scale)
                out.copy_(torch.addmm(even @ low.t(), odd, high.t()) * a_scale)
    return rows


def _plain(b: Tensor, b_scale: Tensor, e: int) -> tuple[Tensor, Tensor]:
    """Return one expert's packed weight ``[N, K/2]`` and its scales ``[N, G]``."""
    if b.ndim == 4:
        (weight,), (scale,) = unpack_w4a8(b[e : e + 1])
    else:
        weight, scale = b[e], b_scale[e]
    return weight, deinterleave_scales(scale, num_rows=len(weight))


def unpack(packed: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the even and the odd columns of an int4 weight ``[N, K/2]`` in float32, scaled."""
    factors = scale.float().unsqueeze(2)
    by_group = (-1, spec.GROUP // 2)
    low = (packed << 4 >> 4).float().unflatten(1, by_group).mul_(factors)
    high = (packed >> 4).float().unflatten(1, by_group).mul_(factors)
    return low.flatten(1), high.flatten(1)

"""Reference of w4a8_grouped_gemm."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from hwfuse.ops import w4a8_grouped_gemm as spec
from hwfuse.packing import deinterleave_scales

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
    scales = deinterleave_scales(b_scale, num_rows=b.shape[1])
    step = max(1, _BLOCK // b.shape[2])
    offsets = expert_offsets.tolist()
    rows[offsets[-1] :] = torch.nan  # unspecified; shows when a consumer reads it
    for e, (start, end) in enumerate(itertools.pairwise(offsets)):
        # Not one grouped product: the weights of one layer are gigabytes in float32.  Blocks that
        # stay in cache are 2 to 4 times as fast as whole experts; empty experts cost nothing.
        if start < end:
            x = a[start:end].float()
            even, odd = x[:, 0::2].contiguous(), x[:, 1::2].contiguous()
            parts = b[e].split(step), scales[e].split(step), rows[start:end].split(step, dim=1)
            for packed, scale, out in zip(*parts, strict=True):
                low, high = unpack(packed, scale)
                out.copy_(torch.addmm(even @ low.t(), odd, high.t()) * a_scale)
    return rows


def unpack(packed: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the even and the odd columns of an int4 weight ``[N, K/2]`` in float32, scaled."""
    factors = scale.float().unsqueeze(2)
    by_group = (-1, spec.GROUP // 2)
    low = (packed << 4 >> 4).float().unflatten(1, by_group).mul_(factors)
    high = (packed >> 4).float().unflatten(1, by_group).mul_(factors)
    return low.flatten(1), high.flatten(1)

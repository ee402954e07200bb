"""Reference of fp8_blockscale_gemm."""

from __future__ import annotations

import torch
from torch import Tensor

from hwfuse.ops import fp8_blockscale_gemm as spec
from hwfuse.packing import unpreshuffle_16x16

REQUIRES: dict[str, object] = {}


def fp8_blockscale_gemm(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    m, n, k = spec.sizes(a, a_scale, b, b_scale, out_dtype=out_dtype)
    num_groups = k // spec.BLOCK
    rows = unpack_exponents(a_scale, num_groups) if a_scale.dtype == torch.int32 else a_scale
    columns = b_scale.repeat_interleave(spec.BLOCK, dim=0)[:n]
    a_blocks = a.float().split(spec.BLOCK, dim=1)
    b_blocks = (unpreshuffle_16x16(b) if b.ndim == 5 else b).float().split(spec.BLOCK, dim=1)
    total = torch.zeros((m, n), dtype=torch.float32, device=a.device)
    for g in range(num_groups):
        # The factors apply to the finished sum of a block, as in the formula.
        total += a_blocks[g] @ b_blocks[g].t() * (rows[:, g, None] * columns[None, :, g])
    return total.to(out_dtype)


def unpack_exponents(packed: Tensor, num_groups: int) -> Tensor:
    """Return the float32 powers of two ``[M, num_groups]`` of packed exponents."""
    shifts = torch.arange(0, 32, 8, dtype=torch.int32, device=packed.device)
    exponents = ((packed.unsqueeze(2) >> shifts) & 0xFF).flatten(1)[:, :num_groups]
    return (exponents << 23).view(torch.float32)

"""Reference of silu_mul_fp8_quant."""

from __future__ import annotations

import torch
from torch import Tensor

from hwfuse.ops import silu_mul_fp8_quant as spec
from hwfuse_reference.torch_ops.moe_permute_fp8_quant import quantise
from hwfuse_reference.torch_ops.silu_mul_fp8_group_quant import silu_mul

REQUIRES = {"deterministic": True}


def silu_mul_fp8_quant(
    rows: Tensor,
    scale: Tensor,
    expert_offsets: Tensor,
) -> Tensor:
    q = spec.outputs(rows, scale, expert_offsets)
    num_used = int(expert_offsets[-1])
    q[:num_used] = quantise(silu_mul(rows[:num_used]), scale)
    q[num_used:] = torch.nan  # unspecified; shows when a consumer reads it
    return q

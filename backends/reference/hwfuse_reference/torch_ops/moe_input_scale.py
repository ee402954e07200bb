"""Reference of moe_input_scale."""

from __future__ import annotations

import torch
from torch import Tensor

from hwfuse.ops import moe_input_scale as spec
from hwfuse_reference.torch_ops.fp8_group_quant import group_scale

REQUIRES = {"deterministic": True}


def moe_input_scale(
    x: Tensor,
    topk_ids: Tensor,
    *,
    num_experts: int,
) -> Tensor:
    spec.sizes(x, topk_ids, num_experts=num_experts)
    is_here = ((topk_ids >= 0) & (topk_ids < num_experts)).any(dim=1)
    largest = torch.where(is_here, x.abs().amax(dim=1), 0)
    return tensor_scale(largest.float())


def tensor_scale(x: Tensor) -> Tensor:
    """Return the scale ``[1]`` that makes the largest of any number of float32 elements QMAX."""
    with_zero = torch.cat([x.flatten(), x.new_zeros(1)])  # none has a maximum, too
    return group_scale(with_zero[None, None], torch.finfo(torch.float8_e4m3fn).max).flatten()

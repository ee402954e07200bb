"""Reference of w4a8_moe_prep."""

from __future__ import annotations

import torch
from torch import Tensor

from hwfuse.ops import w4a8_moe_prep as spec

REQUIRES = {"deterministic": True}


def w4a8_moe_prep(
    topk_ids: Tensor,
    *,
    num_experts: int,
    n: int,
    k: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _, topk = spec.sizes(topk_ids, num_experts=num_experts, n=n, k=k)
    ids = topk_ids.flatten()
    is_valid = (ids >= 0) & (ids < num_experts)
    # Every invalid route sorts behind the last expert, so a position in the order is a row.
    experts, routes = torch.where(is_valid, ids, num_experts).sort(stable=True)
    bounds = torch.arange(num_experts + 1, dtype=torch.int32, device=ids.device)
    expert_offsets = torch.searchsorted(experts, bounds).int()
    counts = expert_offsets.diff()
    rows = torch.arange(ids.numel(), device=ids.device)
    route_to_row = torch.where(is_valid, routes.argsort(), -1)
    row_to_token = torch.where(rows < expert_offsets[-1], routes // topk, 0)
    return (
        expert_offsets,
        torch.stack([torch.full_like(counts, 2 * n), counts, torch.full_like(counts, k)], dim=1),
        torch.stack([torch.full_like(counts, k), counts, torch.full_like(counts, n)], dim=1),
        route_to_row.view(topk_ids.shape).int(),
        row_to_token.int(),
    )

"""Reference of moe_unpermute_reduce."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from hwfuse.ops import moe_unpermute_reduce as spec

REQUIRES = {"deterministic": True}


def moe_unpermute_reduce(
    rows: Tensor,
    route_to_row: Tensor,
    topk_weights: Tensor,
    *,
    routed_scaling_factor: float = 1.0,
) -> Tensor:
    spec.sizes(rows, route_to_row, topk_weights, routed_scaling_factor=routed_scaling_factor)
    # The valid routes only: a row of no route may be NaN, which times a weight of 0 stays NaN.
    is_valid = route_to_row >= 0
    first_route = F.pad(is_valid.sum(dim=1).cumsum(dim=0), (1, 0))
    total = F.embedding_bag(
        route_to_row[is_valid],
        rows.float(),
        first_route.to(route_to_row.dtype),
        mode="sum",
        per_sample_weights=topk_weights[is_valid],
        include_last_offset=True,
    )
    return (total * routed_scaling_factor).to(rows.dtype)

"""moe_unpermute_reduce: the Triton kernel that ROCm runs too."""

from torch import Tensor

from hwfuse_triton import moe_rows as shared
from hwfuse_triton._replay import replayed

REQUIRES = {"deterministic": True, "batch_invariant": True}


@replayed
def moe_unpermute_reduce(
    rows: Tensor,
    route_to_row: Tensor,
    topk_weights: Tensor,
    *,
    routed_scaling_factor: float = 1.0,
) -> Tensor:
    return shared.moe_unpermute_reduce(
        rows, route_to_row, topk_weights, routed_scaling_factor=routed_scaling_factor
    )

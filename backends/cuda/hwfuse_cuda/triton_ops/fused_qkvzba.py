"""fused_qkvzba: the Triton kernel that ROCm runs too."""

from torch import Tensor

from hwfuse_triton import fused_qkvzba as shared
from hwfuse_triton._replay import replayed

REQUIRES = {"deterministic": True, "batch_invariant": True}


@replayed
def fused_qkvzba(
    qkvz: Tensor,
    ba: Tensor,
    *,
    head_k_dim: int,
    head_v_dim: int,
    layout: str = "interleaved",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return shared.fused_qkvzba(
        qkvz, ba, head_k_dim=head_k_dim, head_v_dim=head_v_dim, layout=layout
    )

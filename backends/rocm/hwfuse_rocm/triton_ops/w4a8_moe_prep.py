"""w4a8_moe_prep: the Triton kernels that CUDA runs too."""

from torch import Tensor

from hwfuse_triton import w4a8_moe_prep as shared
from hwfuse_triton._replay import replayed

REQUIRES = {"deterministic": True}
VARIANTS = {
    "one launch, a program per expert": "m * topk <= 1024",
    "three launches: count, add, place": "m * topk > 1024",
}


@replayed
def w4a8_moe_prep(
    topk_ids: Tensor,
    *,
    num_experts: int,
    n: int,
    k: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return shared.w4a8_moe_prep(topk_ids, num_experts=num_experts, n=n, k=k, wave=64)

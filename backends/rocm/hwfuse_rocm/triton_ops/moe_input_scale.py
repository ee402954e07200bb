"""moe_input_scale: the Triton kernels that CUDA runs too."""

from torch import Tensor

from hwfuse_triton import moe_rows as shared
from hwfuse_triton._replay import replayed

REQUIRES = {"deterministic": True}


@replayed
def moe_input_scale(
    x: Tensor,
    topk_ids: Tensor,
    *,
    num_experts: int,
) -> Tensor:
    return shared.moe_input_scale(x, topk_ids, num_experts=num_experts, wave=64)

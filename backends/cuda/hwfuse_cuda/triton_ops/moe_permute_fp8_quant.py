"""moe_permute_fp8_quant: the Triton kernel that ROCm runs too."""

from torch import Tensor

from hwfuse_triton import moe_rows as shared
from hwfuse_triton._replay import replayed

REQUIRES = {"deterministic": True}


@replayed
def moe_permute_fp8_quant(
    x: Tensor,
    route_to_row: Tensor,
    scale: Tensor,
) -> Tensor:
    return shared.moe_permute_fp8_quant(x, route_to_row, scale)

"""silu_mul_fp8_quant: the Triton kernel that CUDA runs too."""

from torch import Tensor

from hwfuse_triton import moe_rows as shared
from hwfuse_triton._replay import replayed

REQUIRES = {"deterministic": True}


@replayed
def silu_mul_fp8_quant(
    rows: Tensor,
    scale: Tensor,
    expert_offsets: Tensor,
) -> Tensor:
    return shared.silu_mul_fp8_quant(rows, scale, expert_offsets, wave=64)

"""w4a8_grouped_gemm: the Triton kernel that CUDA runs too."""

from torch import Tensor

from hwfuse_triton import w4a8_grouped_gemm as shared
from hwfuse_triton._replay import replayed

REQUIRES = {
    "arch": ("gfx942", "gfx950"),  # Triton 3.7 fails to compile it for gfx12
    "facts": ("b.ndim == 3",),  # checkpoint order; repacked blocks are CUDA C++'s
    "deterministic": True,
}
VARIANTS = {
    "tiles of 128 tokens": "m > 512 * num_experts",
    "tiles of 64 tokens": "m > 64 * num_experts",
    "tiles of 32 tokens": "m > 8 * num_experts",
    "tiles of 16 tokens, loads further ahead": "m <= 128",
    "tiles of 16 tokens": "m > 128",
}


@replayed
def w4a8_grouped_gemm(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    expert_offsets: Tensor,
) -> Tensor:
    return shared.w4a8_grouped_gemm(a, a_scale, b, b_scale, expert_offsets, wave=64)

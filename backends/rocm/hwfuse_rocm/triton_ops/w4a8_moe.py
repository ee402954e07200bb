"""w4a8_moe: the chain of its parts that CUDA runs too."""

from torch import Tensor

from hwfuse_triton import w4a8_moe as shared

REQUIRES = {  # traits are those of the parts, which are chosen one by one
    "arch": ("gfx942", "gfx950"),  # Triton 3.7 fails to compile the grouped GEMM for gfx12
}
VARIANTS = {
    "six ops, each on its own best implementation": "a1_scale.shape[0] + a2_scale.shape[0] == 2",
    "six ops, each on its own best implementation; computes a scale": "m >= 0",
}


def w4a8_moe(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w13: Tensor,
    w13_scale: Tensor,
    w2: Tensor,
    w2_scale: Tensor,
    a1_scale: Tensor,
    a2_scale: Tensor,
    *,
    routed_scaling_factor: float = 1.0,
) -> Tensor:
    return shared.w4a8_moe(
        x,
        topk_ids,
        topk_weights,
        w13,
        w13_scale,
        w2,
        w2_scale,
        a1_scale,
        a2_scale,
        routed_scaling_factor=routed_scaling_factor,
        wave=64,
    )

"""fused_qkvzba: aiter's Triton kernel for the interleaved layout.

Experimental, because it lies in a private module of aiter and only in newer ones than 0.1.7.
"""

from torch import Tensor

from hwfuse.ops import fused_qkvzba as spec
from hwfuse_rocm import _aiter

REQUIRES = {
    "arch": ("gfx942", "gfx950"),
    "packages": ("aiter.ops.triton._triton_kernels.gated_delta_rule.fused_qkvzba_split",),
    "facts": (
        "layout == 'interleaved'",
        "qkvz.is_contiguous()",
        "ba.is_contiguous()",
        "head_k_dim in (16, 32, 64, 128, 256)",
        "head_v_dim in (16, 32, 64, 128, 256)",
        "r in (1, 2, 4, 8)",
    ),
    "experimental": True,
}


def fused_qkvzba(
    qkvz: Tensor,
    ba: Tensor,
    *,
    head_k_dim: int,
    head_v_dim: int,
    layout: str = "interleaved",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = {"head_k_dim": head_k_dim, "head_v_dim": head_v_dim, "layout": layout}
    m, num_k_heads, num_v_heads, _ = spec.sizes(qkvz, ba, **options)
    if m == 0:
        return spec.outputs(qkvz, ba, **options)
    _aiter.check_size("qkvz", m, qkvz.shape[1])
    split = _aiter.function("fused_qkvzba_split_reshape_cat_decode")
    return split(qkvz, ba, num_k_heads, num_v_heads, head_k_dim, head_v_dim)

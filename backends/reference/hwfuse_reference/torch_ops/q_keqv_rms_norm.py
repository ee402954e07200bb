"""Reference of q_keqv_rms_norm."""

from __future__ import annotations

from torch import Tensor

from hwfuse.ops import q_keqv_rms_norm as spec
from hwfuse_reference.torch_ops.qkv_rms_norm import norm_heads

REQUIRES = {"differentiable": True, "deterministic": True}


def q_keqv_rms_norm(
    q: Tensor,
    kv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    *,
    head_dim: int,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    m, num_q_heads, num_kv_heads = spec.sizes(q, kv, q_weight, k_weight, head_dim=head_dim, eps=eps)
    return (
        norm_heads(q, (m, num_q_heads, head_dim), q_weight, eps),
        norm_heads(kv, (m, num_kv_heads, head_dim), k_weight, eps),
        norm_heads(kv, (m, num_kv_heads, head_dim), None, eps),
    )

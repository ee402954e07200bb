"""Reference of qkv_rms_norm_."""

from __future__ import annotations

from torch import Tensor

from hwfuse.ops import qkv_rms_norm_ as spec
from hwfuse_reference.torch_ops.qkv_rms_norm import norm_heads

REQUIRES = {"deterministic": True}


def qkv_rms_norm_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    *,
    head_dim: int,
    eps: float = 1e-6,
) -> None:
    m, num_q_heads, num_kv_heads = spec.sizes(
        q, k, v, q_weight, k_weight, head_dim=head_dim, eps=eps
    )
    q.copy_(norm_heads(q, (m, num_q_heads, head_dim), q_weight, eps))
    k.copy_(norm_heads(k, (m, num_kv_heads, head_dim), k_weight, eps))
    v.copy_(norm_heads(v, (m, num_kv_heads, head_dim), None, eps))

"""Reference of q_rms_norm."""

from __future__ import annotations

from torch import Tensor

from hwfuse.ops import q_rms_norm as spec
from hwfuse_reference.torch_ops.qkv_rms_norm import norm_heads

REQUIRES = {"differentiable": True, "deterministic": True}


def q_rms_norm(
    q: Tensor,
    q_weight: Tensor,
    *,
    head_dim: int,
    eps: float = 1e-6,
) -> Tensor:
    m, num_q_heads = spec.sizes(q, q_weight, head_dim=head_dim, eps=eps)
    return norm_heads(q, (m, num_q_heads, head_dim), q_weight, eps)

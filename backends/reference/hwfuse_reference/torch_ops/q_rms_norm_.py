"""Reference of q_rms_norm_."""

from __future__ import annotations

from torch import Tensor

from hwfuse.ops import q_rms_norm_ as spec
from hwfuse_reference.torch_ops.qkv_rms_norm import norm_heads

REQUIRES = {"deterministic": True}


def q_rms_norm_(
    q: Tensor,
    q_weight: Tensor,
    *,
    head_dim: int,
    eps: float = 1e-6,
) -> None:
    m, num_q_heads = spec.sizes(q, q_weight, head_dim=head_dim, eps=eps)
    q.copy_(norm_heads(q, (m, num_q_heads, head_dim), q_weight, eps))

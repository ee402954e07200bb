"""Reference of qkv_rms_norm."""

from __future__ import annotations

from torch import Tensor

from hwfuse.ops import qkv_rms_norm as spec

REQUIRES = {"differentiable": True, "deterministic": True}


def qkv_rms_norm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    *,
    head_dim: int,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    m, num_q_heads, num_kv_heads = spec.sizes(
        q, k, v, q_weight, k_weight, head_dim=head_dim, eps=eps
    )
    return (
        norm_heads(q, (m, num_q_heads, head_dim), q_weight, eps),
        norm_heads(k, (m, num_kv_heads, head_dim), k_weight, eps),
        norm_heads(v, (m, num_kv_heads, head_dim), None, eps),
    )


def norm_heads(x: Tensor, heads: tuple[int, int, int], weight: Tensor | None, eps: float) -> Tensor:
    """Return x normalised over the last of the dimensions *heads*, in new memory of x's shape."""
    y = x.float().reshape(heads)
    y = y * (y.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    if weight is not None:
        y = y * weight.float()
    return y.to(x.dtype).reshape(x.shape)

import torch
from torch import Tensor

from hwfuse.ops import fused_qkvzba as spec

REQUIRES = {"experimental": True, "facts": ("layout == 'interleaved'",)}


def fused_qkvzba(
    qkvz: Tensor, ba: Tensor, *, head_k_dim: int, head_v_dim: int, layout: str = "interleaved"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    m, hk, hv, r = spec.sizes(qkvz, ba, head_k_dim=head_k_dim, head_v_dim=head_v_dim, layout=layout)
    records = torch.arange(qkvz.shape[1], device=qkvz.device).view(hk, -1)
    q, k, v, z = records.split([head_k_dim, head_k_dim, r * head_v_dim, r * head_v_dim], dim=1)
    b, a = torch.arange(2 * hv, device=ba.device).view(hk, 2, r).unbind(1)
    mixed_qkv = qkvz.index_select(1, torch.cat([q.flatten(), k.flatten(), v.flatten()]))
    z = qkvz.index_select(1, z.flatten()).view(m, hv, head_v_dim)
    return mixed_qkv, z, ba.index_select(1, b.flatten()), ba.index_select(1, a.flatten())

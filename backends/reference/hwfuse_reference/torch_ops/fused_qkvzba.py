"""Reference of fused_qkvzba."""

from __future__ import annotations

import torch
from torch import Tensor

from hwfuse.ops import fused_qkvzba as spec

REQUIRES = {"differentiable": True, "deterministic": True}


def fused_qkvzba(
    qkvz: Tensor,
    ba: Tensor,
    *,
    head_k_dim: int,
    head_v_dim: int,
    layout: str = "interleaved",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    m, num_k_heads, num_v_heads, _ = spec.sizes(
        qkvz, ba, head_k_dim=head_k_dim, head_v_dim=head_v_dim, layout=layout
    )
    # A contiguous row is an interleaved one with a single record that holds every head.
    records = num_k_heads if layout == "interleaved" else 1
    qk, vz = num_k_heads * head_k_dim // records, num_v_heads * head_v_dim // records
    q, k, v, z = qkvz.unflatten(1, (records, 2 * qk + 2 * vz)).split([qk, qk, vz, vz], dim=2)
    b, a = ba.unflatten(1, (records, 2 * num_v_heads // records)).chunk(2, dim=2)
    return (
        torch.cat([q.flatten(1), k.flatten(1), v.flatten(1)], dim=1),
        # clone: these reshapes are views of the input when there is one record.
        z.reshape(m, num_v_heads, head_v_dim).clone(memory_format=torch.contiguous_format),
        b.reshape(m, num_v_heads).clone(memory_format=torch.contiguous_format),
        a.reshape(m, num_v_heads).clone(memory_format=torch.contiguous_format),
    )

"""Reference of fused_qkvbfg."""

from __future__ import annotations

from torch import Tensor

from hwfuse.ops import fused_qkvbfg as spec

REQUIRES = {"differentiable": True}


def fused_qkvbfg(x: Tensor, w_qkvbfg: Tensor, w_fg: Tensor) -> tuple[Tensor, Tensor]:
    head_dim = spec.sizes(x, w_qkvbfg, w_fg).head_dim
    qkvbfg = (x.float() @ w_qkvbfg.float().t()).to(x.dtype)
    low_ranks = qkvbfg[:, -2 * head_dim :].unflatten(1, (2, head_dim)).transpose(0, 1)
    gates = (low_ranks.float() @ w_fg.float().mT).to(x.dtype)
    return qkvbfg, gates

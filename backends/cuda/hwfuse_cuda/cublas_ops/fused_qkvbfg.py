"""fused_qkvbfg: one GEMM and one batched GEMM of cuBLAS, by way of torch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hwfuse.ops import fused_qkvbfg as spec

REQUIRES = {"differentiable": True}


def fused_qkvbfg(x: Tensor, w_qkvbfg: Tensor, w_fg: Tensor) -> tuple[Tensor, Tensor]:
    head_dim = spec.sizes(x, w_qkvbfg, w_fg).head_dim
    qkvbfg = F.linear(x, w_qkvbfg)
    low_ranks = qkvbfg[:, -2 * head_dim :].unflatten(1, (2, head_dim)).transpose(0, 1)
    return qkvbfg, torch.bmm(low_ranks, w_fg.mT)

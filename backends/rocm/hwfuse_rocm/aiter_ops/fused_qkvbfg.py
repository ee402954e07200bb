"""fused_qkvbfg: torch's GEMM (hipBLASLt), then aiter's batched Triton GEMM for the two gates."""

import torch.nn.functional as F
from torch import Tensor

from hwfuse.ops import fused_qkvbfg as spec
from hwfuse_rocm import _aiter

REQUIRES = {
    "arch": ("gfx942", "gfx950"),
    "facts": ("x.dtype in (bfloat16, float16)", "w_fg.is_contiguous()"),
}
COPIES = {"qkvbfg": "its low ranks are made contiguous, by aiter 0.1.7"}


def fused_qkvbfg(x: Tensor, w_qkvbfg: Tensor, w_fg: Tensor) -> tuple[Tensor, Tensor]:
    m, n, _, _, head_dim = spec.sizes(x, w_qkvbfg, w_fg)
    if m == 0:
        return spec.outputs(x, w_qkvbfg, w_fg)
    _aiter.check_size("x", m, n)
    qkvbfg = F.linear(x, w_qkvbfg)
    low_ranks = qkvbfg[:, -2 * head_dim :].unflatten(1, (2, head_dim)).transpose(0, 1)
    gemm = _aiter.function("triton_batched_gemm_bf16")
    return qkvbfg, gemm(low_ranks, w_fg, dtype=x.dtype)

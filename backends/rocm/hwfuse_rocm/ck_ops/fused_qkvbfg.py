"""fused_qkvbfg: torch's GEMM (hipBLASLt), then Composable Kernel's batched GEMM for the two gates.

Experimental, because whether CK rounds or truncates to bfloat16 is an option of its build, and the
op's tolerance of the gates is below a truncation.
"""

import torch.nn.functional as F
from torch import Tensor

from hwfuse.ops import fused_qkvbfg as spec
from hwfuse_rocm import _aiter

REQUIRES = {
    "arch": ("gfx942", "gfx950"),
    "facts": ("x.dtype == bfloat16", "w_fg.is_contiguous()"),
    "experimental": True,
}
COPIES = {"qkvbfg": "its low ranks are made contiguous"}


def fused_qkvbfg(x: Tensor, w_qkvbfg: Tensor, w_fg: Tensor) -> tuple[Tensor, Tensor]:
    m, n, _, _, head_dim = spec.sizes(x, w_qkvbfg, w_fg)
    if m == 0:
        return spec.outputs(x, w_qkvbfg, w_fg)
    _aiter.check_size("x", m, n)
    qkvbfg = F.linear(x, w_qkvbfg)
    low_ranks = qkvbfg[:, -2 * head_dim :].unflatten(1, (2, head_dim)).transpose(0, 1)
    gemm = _aiter.function("batched_gemm_bf16_CK")
    return qkvbfg, gemm(low_ranks.contiguous(), w_fg, dtype=x.dtype)

"""fused_qkvbfg: the Triton kernels that CUDA runs for few tokens, here for any number."""

from torch import Tensor

from hwfuse_triton import fused_qkvbfg as shared
from hwfuse_triton._replay import replayed

REQUIRES = {"deterministic": True}
VARIANTS = {
    "one token": "m <= 1",
    "16 tokens": "m <= 16",
    "32 tokens": "m <= 32",
    "64 tokens": "m <= 64",
    "128 tokens": "m > 64",
}


@replayed
def fused_qkvbfg(x: Tensor, w_qkvbfg: Tensor, w_fg: Tensor) -> tuple[Tensor, Tensor]:
    return shared.fused_qkvbfg(x, w_qkvbfg, w_fg, wave=64)

"""fused_qkvbfg for few tokens, where reading the weights is all; cuBLAS takes the others."""

from torch import Tensor

from hwfuse_triton import fused_qkvbfg as shared
from hwfuse_triton._replay import replayed

REQUIRES = {
    # Proved there.  It compiles for sm80 and sm100 too, but see `Tile` in the shared file: a
    # compiler may get the sum of two halves wrong, so such a card must first have run parity.
    "arch": ("sm90",),
    "facts": ("m <= 64",),  # from there on cuBLAS is as fast, and later faster
    "deterministic": True,
}
VARIANTS = {
    "one token": "m <= 1",
    "16 tokens": "m <= 16",
    "32 tokens": "m <= 32",
    "64 tokens": "m <= 64",
}


@replayed
def fused_qkvbfg(x: Tensor, w_qkvbfg: Tensor, w_fg: Tensor) -> tuple[Tensor, Tensor]:
    return shared.fused_qkvbfg(x, w_qkvbfg, w_fg)

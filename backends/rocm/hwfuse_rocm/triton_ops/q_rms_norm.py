"""q_rms_norm: the Triton kernel that CUDA runs too."""

from torch import Tensor

from hwfuse_triton import head_norms as shared
from hwfuse_triton._replay import replayed

REQUIRES = {
    "facts": ("head_dim <= 32768",),  # a head lies in the registers of one program
    "deterministic": True,
    "batch_invariant": True,
}
VARIANTS = {
    "small tiles": "m * num_q_heads * head_dim <= 2097152",
    "large tiles": "m * num_q_heads * head_dim > 2097152",
}


@replayed
def q_rms_norm(
    q: Tensor,
    q_weight: Tensor,
    *,
    head_dim: int,
    eps: float = 1e-6,
) -> Tensor:
    return shared.q_rms_norm(q, q_weight, head_dim=head_dim, eps=eps, wave=64)

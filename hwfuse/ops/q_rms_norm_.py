"""Spec of q_rms_norm_: the in-place twin of q_rms_norm."""

from __future__ import annotations

from torch import Tensor

from hwfuse._errors import InputError
from hwfuse.ops import q_rms_norm as twin

MUTATES = ("q",)
DIMS = twin.DIMS
COMPARE = twin.COMPARE
Sizes = twin.Sizes
make_inputs = twin.make_inputs


def q_rms_norm_(
    q: Tensor,
    q_weight: Tensor,
    *,
    head_dim: int,
    eps: float = 1e-6,
) -> None:
    """Normalise each head of q in place: `q_rms_norm` without new memory.

    Shapes: M tokens, Hq heads of D elements.

    Args:
        q: ``[M, Hq*D]`` or ``[M, Hq, D]``, bfloat16, float16 or float32.  The elements of a token
            side by side, row stride free, rows that do not overlap.
        q_weight: ``[D]``, bfloat16, float16 or float32: the plain factor w.
        head_dim: D, in elements.
        eps: added to the mean square.

    Returns:
        None.

    Writes: q; nothing beside its columns.

    Raises:
        InputError: as `q_rms_norm`; or rows overlap.

    Empty input: M = 0 writes nothing.

    Formula: that of `q_rms_norm`, in float32, rounded once.

    Gradient: none, inference only.

    Source: as `q_rms_norm`.
    """
    raise NotImplementedError


def sizes(
    q: Tensor,
    q_weight: Tensor,
    *,
    head_dim: int,
    eps: float = 1e-6,
) -> twin.Sizes:
    """Check a call and return its sizes."""
    result = twin.sizes(q, q_weight, head_dim=head_dim, eps=eps)
    # A symbolic m comes from tracing, where a comparison would become a guard; the call itself is
    # checked when it runs.
    if type(result.m) is int and result.m > 1:
        width, stride = result.num_q_heads * head_dim, q.stride()[0]
        if stride < width:
            needed = f"at least {width}: rows that do not overlap"
            raise InputError("q.stride(0)", stride, needed)
    return result


def outputs(
    q: Tensor,
    q_weight: Tensor,
    *,
    head_dim: int,
    eps: float = 1e-6,
) -> None:
    """Check a call; there is nothing to allocate."""
    sizes(q, q_weight, head_dim=head_dim, eps=eps)

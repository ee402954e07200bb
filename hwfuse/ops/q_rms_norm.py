"""Spec of q_rms_norm: Gemma4's one norm where the keys and values of another layer are used."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hwfuse._checks import same_device
from hwfuse._errors import InputError
from hwfuse.ops import qkv_rms_norm as family
from hwfuse.ops.qkv_rms_norm import _check_weight, _rows_and_heads

DIMS = {
    # Of the two-dimensional form; the rows come first in both.
    "q": "m w_q",
    "q_weight": "head_dim",
}
COMPARE = {"q": family.COMPARE["q"]}


def q_rms_norm(
    q: Tensor,
    q_weight: Tensor,
    *,
    head_dim: int,
    eps: float = 1e-6,
) -> Tensor:
    """Normalise each head of q to root mean square 1 and weight it.

    Shapes: M tokens, Hq heads of D elements.  The head count follows from the shape.

    Args:
        q: ``[M, Hq*D]`` or ``[M, Hq, D]``, bfloat16, float16 or float32.  The elements of a token
            side by side, row stride free.
        q_weight: ``[D]``, bfloat16, float16 or float32, one for all heads.  The plain factor w,
            not the 1 + w of Gemma2 and Gemma3.
        head_dim: D, in elements.
        eps: added to the mean square.

    Returns:
        q: shape and dtype of the argument *q*, in new contiguous memory.

    Raises:
        InputError: a width that is no multiple of head_dim, a weight of another length, or an
            argument of another rank, dtype, device or stride.

    Empty input: M = 0 gives an empty output.

    Formula: for each head vector ``y = x * rsqrt(mean(x**2) + eps) * w`` in float32, rounded once.

    Source: Gemma4's q_norm in layers that share the keys and values of an earlier one.
    """
    raise NotImplementedError


class Sizes(NamedTuple):
    """What follows from the shapes."""

    m: int
    num_q_heads: int


def sizes(
    q: Tensor,
    q_weight: Tensor,
    *,
    head_dim: int,
    eps: float = 1e-6,
) -> Sizes:
    """Check a call and return its sizes."""
    if head_dim < 1:
        raise InputError("head_dim", head_dim, "a positive number")
    m, num_q_heads = _rows_and_heads("q", q, head_dim, family.DTYPES)
    _check_weight("q_weight", q_weight, head_dim)
    same_device("q_weight", q_weight, "q", q)
    return Sizes(m, num_q_heads)


def outputs(
    q: Tensor,
    q_weight: Tensor,
    *,
    head_dim: int,
    eps: float = 1e-6,
) -> Tensor:
    """Allocate the result, uninitialised."""
    sizes(q, q_weight, head_dim=head_dim, eps=eps)
    return q.new_empty(q.shape)


def make_inputs(
    *,
    m: int = 64,
    num_q_heads: int = 8,
    head_dim: int = 256,
    eps: float = 1e-6,
    row_pad: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    weight_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Return one call's arguments; with *row_pad* q is a slice of wider rows.

    Magnitudes differ from token to token, and every sixteenth token from the second on is zero.
    """
    from hwfuse._random import Random

    random = Random(seed, device)
    q = random.rows(m, num_q_heads * head_dim, row_pad=row_pad, dtype=dtype)
    q *= random.integers(-8, 9, m, 1, dtype=torch.float32).exp2().to(dtype)
    q[1::16] = 0.0
    return {
        "q": q,
        "q_weight": random.normal(head_dim, dtype=weight_dtype or dtype),
        "head_dim": head_dim,
        "eps": eps,
    }

"""Spec of qkv_rms_norm: Gemma4's three norms of the attention heads in one op."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hwfuse._checks import check, same_device
from hwfuse._errors import InputError

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DIMS = {
    # Of the two-dimensional form; the rows come first in both.
    "q": "m w_q",
    "k": "m w_kv",
    "v": "m w_kv",
    "q_weight": "head_dim",
    "k_weight": "head_dim",
}


def qkv_rms_norm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    *,
    head_dim: int,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise each head of q, k and v to root mean square 1; q and k are then weighted.

    Shapes: M tokens; Hq query heads, Hkv key and value heads of D elements.  Head counts follow
    from the shapes.

    Args:
        q: ``[M, Hq*D]`` or ``[M, Hq, D]``, bfloat16, float16 or float32.  The elements of a token
            side by side, row stride free: usually a slice of one projection's rows.
        k: ``[M, Hkv*D]`` or ``[M, Hkv, D]``, dtype of *q*.  Strides as *q*.
        v: ``[M, Hkv*D]`` or ``[M, Hkv, D]``, dtype of *q*.  Strides as *q*.
        q_weight: ``[D]``, bfloat16, float16 or float32, one for all heads.  The plain factor w,
            not the 1 + w of Gemma2 and Gemma3.
        k_weight: ``[D]``, as *q_weight*.  v has no weight.
        head_dim: D, in elements.
        eps: added to the mean square.

    Returns:
        q: shape and dtype of the argument *q*.  New contiguous memory, as all outputs.
        k: shape and dtype of the argument *k*.
        v: shape and dtype of the argument *v*.

    Raises:
        InputError: a width that is no multiple of head_dim, shapes that do not fit each other, or
            an argument of another rank, dtype, device or stride.

    Empty input: M = 0 gives empty outputs.

    Formula: for each head vector ``y = x * rsqrt(mean(x**2) + eps) * w`` in float32, rounded once.

    Source: Gemma4's q_norm, k_norm and v_norm (``with_scale=False``); SGLang's fused form.
    """
    raise NotImplementedError


class Sizes(NamedTuple):
    """What follows from the shapes."""

    m: int
    num_q_heads: int
    num_kv_heads: int


def sizes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    *,
    head_dim: int,
    eps: float = 1e-6,
) -> Sizes:
    """Check a call and return its sizes."""
    if head_dim < 1:
        raise InputError("head_dim", head_dim, "a positive number")
    m, num_q_heads = _rows_and_heads("q", q, head_dim, DTYPES)
    same_as_q = (q.dtype,)
    k_rows, num_kv_heads = _rows_and_heads("k", k, head_dim, same_as_q)
    v_rows, num_v_heads = _rows_and_heads("v", v, head_dim, same_as_q)
    if k_rows != m:
        raise InputError("k.shape[0]", k_rows, f"{m}, the number of rows of q")
    if v_rows != m:
        raise InputError("v.shape[0]", v_rows, f"{m}, the number of rows of q")
    if num_v_heads != num_kv_heads:
        raise InputError("v.shape", tuple(v.shape), f"{num_kv_heads} heads, as k")
    _check_weight("q_weight", q_weight, head_dim)
    _check_weight("k_weight", k_weight, head_dim)
    for name, tensor in (("k", k), ("v", v), ("q_weight", q_weight), ("k_weight", k_weight)):
        same_device(name, tensor, "q", q)
    return Sizes(m, num_q_heads, num_kv_heads)


def outputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    *,
    head_dim: int,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the results, uninitialised."""
    sizes(q, k, v, q_weight, k_weight, head_dim=head_dim, eps=eps)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def make_inputs(
    *,
    m: int = 64,
    num_q_heads: int = 32,
    num_kv_heads: int = 16,
    head_dim: int = 256,
    eps: float = 1e-6,
    row_pad: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    weight_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Return one call's arguments: q, k and v are slices of one buffer, as a projection gives them.

    Magnitudes differ from token to token, and every sixteenth token from the second on is zero.
    """
    from hwfuse._random import Random

    random = Random(seed, device)
    widths = [num_q_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
    qkv = random.rows(m, sum(widths), row_pad=row_pad, dtype=dtype)
    qkv *= random.integers(-8, 9, m, 1, dtype=torch.float32).exp2().to(dtype)
    qkv[1::16] = 0.0
    q, k, v = torch.split(qkv, widths, dim=1)
    return {
        "q": q,
        "k": k,
        "v": v,
        "q_weight": random.normal(head_dim, dtype=weight_dtype or dtype),
        "k_weight": random.normal(head_dim, dtype=weight_dtype or dtype),
        "head_dim": head_dim,
        "eps": eps,
    }


# The sum of squares may be taken in any order: about 1e-7 relative, the neighbouring number on at
# most 1 of 10,000 roundings to float16, fewer to bfloat16.  A second rounding moves a quarter of
# them.  Results in float32 differ throughout, by up to 5 steps; rounded in between, by thousands.
_NORM: tuple[str, dict[str, Any]] = ("ulps", {"max_ulps": 1, "share": 1e-3, "float32": 16})
COMPARE: dict[str, tuple[str, dict[str, Any]]] = {"q": _NORM, "k": _NORM, "v": _NORM}


def _rows_and_heads(
    name: str, x: Tensor, head_dim: int, dtypes: tuple[torch.dtype, ...]
) -> tuple[int, int]:
    if x.ndim != 3:
        check(name, x, 2, dtypes)
        m, width = x.shape
        num_heads = width // head_dim
        if width % head_dim or not num_heads:
            raise InputError(f"{name}.shape[1]", width, f"a positive multiple of {head_dim}")
        return m, num_heads
    check(name, x, 3, dtypes)
    m, num_heads, width = x.shape
    if width != head_dim or not num_heads:
        raise InputError(f"{name}.shape", tuple(x.shape), f"[m, heads, head_dim = {head_dim}]")
    if x.stride(1) != head_dim and num_heads != 1:
        raise InputError(f"{name}.stride(1)", x.stride(1), f"{head_dim}: heads side by side")
    return m, num_heads


def _check_weight(name: str, weight: Tensor, head_dim: int) -> None:
    check(name, weight, 1, DTYPES)
    if weight.shape[0] != head_dim:
        raise InputError(f"{name}.shape[0]", weight.shape[0], f"head_dim = {head_dim}")

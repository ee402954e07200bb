"""Spec of q_keqv_rms_norm: Gemma4's norms where key and value are one projection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hwfuse._checks import same_device
from hwfuse._errors import InputError
from hwfuse.ops import qkv_rms_norm as family
from hwfuse.ops.qkv_rms_norm import _check_weight, _rows_and_heads

DIMS = {
    # Of the two-dimensional form; the rows come first in both.
    "q": "m w_q",
    "kv": "m w_kv",
    "q_weight": "head_dim",
    "k_weight": "head_dim",
}
COMPARE = family.COMPARE
Sizes = family.Sizes


def q_keqv_rms_norm(
    q: Tensor,
    kv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    *,
    head_dim: int,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise each head of q and of kv to root mean square 1; weighted, kv is k, plain, it is v.

    Shapes: M tokens; Hq query heads, Hkv key and value heads of D elements.  Head counts follow
    from the shapes.

    Args:
        q: ``[M, Hq*D]`` or ``[M, Hq, D]``, bfloat16, float16 or float32.  The elements of a token
            side by side, row stride free: usually a slice of one projection's rows.
        kv: ``[M, Hkv*D]`` or ``[M, Hkv, D]``, dtype of *q*.  Strides as *q*.  The raw projection:
            no weight and no rotation yet.
        q_weight: ``[D]``, bfloat16, float16 or float32, one for all heads.  The plain factor w,
            not the 1 + w of Gemma2 and Gemma3.
        k_weight: ``[D]``, as *q_weight*.  v has no weight.
        head_dim: D, in elements.
        eps: added to the mean square.

    Returns:
        q: shape and dtype of the argument *q*.  New contiguous memory, as all outputs: k may be
            rotated in place afterwards without touching v.
        k: shape and dtype of *kv*.
        v: shape and dtype of *kv*.

    Raises:
        InputError: a width that is no multiple of head_dim, shapes that do not fit each other, or
            an argument of another rank, dtype, device or stride.

    Empty input: M = 0 gives empty outputs.

    Formula: for each head vector ``y = x * rsqrt(mean(x**2) + eps) * w`` in float32, rounded once;
    k and v have the same x, and v has w = 1.

    Source: Gemma4's attention with ``attention_k_eq_v``, which has no v_proj; SGLang #25461.
    """
    raise NotImplementedError


def sizes(
    q: Tensor,
    kv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    *,
    head_dim: int,
    eps: float = 1e-6,
) -> family.Sizes:
    """Check a call and return its sizes."""
    if head_dim < 1:
        raise InputError("head_dim", head_dim, "a positive number")
    m, num_q_heads = _rows_and_heads("q", q, head_dim, family.DTYPES)
    kv_rows, num_kv_heads = _rows_and_heads("kv", kv, head_dim, (q.dtype,))
    if kv_rows != m:
        raise InputError("kv.shape[0]", kv_rows, f"{m}, the number of rows of q")
    _check_weight("q_weight", q_weight, head_dim)
    _check_weight("k_weight", k_weight, head_dim)
    same_device("kv", kv, "q", q)
    same_device("q_weight", q_weight, "q", q)
    same_device("k_weight", k_weight, "q", q)
    return Sizes(m, num_q_heads, num_kv_heads)


def outputs(
    q: Tensor,
    kv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    *,
    head_dim: int,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the results, uninitialised."""
    sizes(q, kv, q_weight, k_weight, head_dim=head_dim, eps=eps)
    return q.new_empty(q.shape), kv.new_empty(kv.shape), kv.new_empty(kv.shape)


def make_inputs(
    *,
    m: int = 64,
    num_q_heads: int = 32,
    num_kv_heads: int = 4,
    head_dim: int = 512,
    eps: float = 1e-6,
    row_pad: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    weight_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Return one call's arguments: q and kv are slices of one buffer, as a projection gives them.

    Magnitudes differ from token to token, and every sixteenth token from the second on is zero.
    """
    from hwfuse._random import Random

    random = Random(seed, device)
    widths = [num_q_heads * head_dim, num_kv_heads * head_dim]
    rows = random.rows(m, sum(widths), row_pad=row_pad, dtype=dtype)
    rows *= random.integers(-8, 9, m, 1, dtype=torch.float32).exp2().to(dtype)
    rows[1::16] = 0.0
    q, kv = torch.split(rows, widths, dim=1)
    return {
        "q": q,
        "kv": kv,
        "q_weight": random.normal(head_dim, dtype=weight_dtype or dtype),
        "k_weight": random.normal(head_dim, dtype=weight_dtype or dtype),
        "head_dim": head_dim,
        "eps": eps,
    }

"""Spec of fused_qkvzba: split the input projections of a gated delta-net layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hwfuse._checks import check, same_device
from hwfuse._errors import InputError

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LAYOUTS = ("interleaved", "contiguous")
DIMS = {"qkvz": "m w_qkvz", "ba": "m w_ba"}


def fused_qkvzba(
    qkvz: Tensor,
    ba: Tensor,
    *,
    head_k_dim: int,
    head_v_dim: int,
    layout: str = "interleaved",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unpack the two input projections of a gated delta-net layer into q|k|v, z, b and a.

    Pure data movement: each output element is a copy of one input element, so all implementations
    agree bit for bit, NaN payloads and the sign of zero included.

    Shapes: M tokens; Hk key heads, Hv value heads, Dk and Dv their widths; r = Hv / Hk, any
    positive integer.  Hv follows from the width of *ba*, then Hk from the width of *qkvz*.

    Args:
        qkvz: ``[M, 2*Hk*Dk + 2*Hv*Dv]``, bfloat16, float16 or float32.  Elements of a row side by
            side, row stride free.
        ba: ``[M, 2*Hv]``, bfloat16, float16 or float32, not necessarily *qkvz*'s.  Strides as
            *qkvz*.
        head_k_dim: Dk, in elements.
        head_v_dim: Dv, in elements.
        layout: the order inside a row of *qkvz* and of *ba*.
            ``"interleaved"`` (Qwen3-Next): for each key head in turn q ``[Dk]``, k ``[Dk]``,
            v ``[r*Dv]``, z ``[r*Dv]``; in *ba* b ``[r]``, a ``[r]``.
            ``"contiguous"`` (Qwen3.5): all q, all k, all v, all z; in *ba* all b, all a.

    Returns:
        mixed_qkv: ``[M, 2*Hk*Dk + Hv*Dv]``, dtype of *qkvz*: all q, all k, all v, heads ascending.
            New contiguous memory, as all outputs, in both layouts.
        z: ``[M, Hv, Dv]``, dtype of *qkvz*.
        b: ``[M, Hv]``, dtype of *ba*.  Logits, before the sigmoid.
        a: ``[M, Hv]``, dtype of *ba*.  Logits, before the softplus.

    Raises:
        InputError: an unknown layout, widths that give no whole number of heads, Hv not a multiple
            of Hk, or an argument of another rank, dtype, device or last stride.

    Empty input: M = 0 gives empty outputs.

    Gradient: each input element receives the gradient of its one copy.

    Source: Qwen3-Next ``fix_query_key_value_ordering`` (interleaved) and Qwen3.5's split
    projections (contiguous); SGLang ``fused_qkvzba_split_reshape_cat`` and its contiguous form.
    """
    raise NotImplementedError


class Sizes(NamedTuple):
    """What follows from the shapes; *r* is the number of value heads per key head."""

    m: int
    num_k_heads: int
    num_v_heads: int
    r: int


def sizes(
    qkvz: Tensor,
    ba: Tensor,
    *,
    head_k_dim: int,
    head_v_dim: int,
    layout: str = "interleaved",
) -> Sizes:
    """Check a call and return its sizes."""
    check("qkvz", qkvz, 2, DTYPES)
    check("ba", ba, 2, DTYPES)
    same_device("ba", ba, "qkvz", qkvz)
    if layout not in LAYOUTS:
        raise InputError("layout", repr(layout), " or ".join(map(repr, LAYOUTS)))
    if head_k_dim < 1:
        raise InputError("head_k_dim", head_k_dim, "a positive number")
    if head_v_dim < 1:
        raise InputError("head_v_dim", head_v_dim, "a positive number")
    (m, width), (ba_rows, ba_width) = qkvz.shape, ba.shape
    if ba_rows != m:
        raise InputError("ba.shape[0]", ba_rows, f"{m}, the number of rows of qkvz")
    num_v_heads = ba_width // 2
    if ba_width % 2 or not num_v_heads:
        raise InputError("ba.shape[1]", ba_width, "2 * num_v_heads, even and positive")
    key_width = width - 2 * num_v_heads * head_v_dim  # no divmod: symbolic sizes lack it
    num_k_heads = key_width // (2 * head_k_dim)
    if key_width % (2 * head_k_dim) or num_k_heads < 1:
        needed = (
            f"2 * num_k_heads * {head_k_dim} + {2 * num_v_heads * head_v_dim}"
            f" (ba gives num_v_heads = {num_v_heads})"
        )
        raise InputError("qkvz.shape[1]", width, needed)
    if num_v_heads % num_k_heads:
        needed = f"a multiple of num_k_heads = {num_k_heads}, which the width of qkvz gives"
        raise InputError("num_v_heads", num_v_heads, needed)
    return Sizes(m, num_k_heads, num_v_heads, num_v_heads // num_k_heads)


def outputs(
    qkvz: Tensor,
    ba: Tensor,
    *,
    head_k_dim: int,
    head_v_dim: int,
    layout: str = "interleaved",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocate the results, uninitialised."""
    m, num_k_heads, num_v_heads, _ = sizes(
        qkvz, ba, head_k_dim=head_k_dim, head_v_dim=head_v_dim, layout=layout
    )
    return (
        qkvz.new_empty((m, 2 * num_k_heads * head_k_dim + num_v_heads * head_v_dim)),
        qkvz.new_empty((m, num_v_heads, head_v_dim)),
        ba.new_empty((m, num_v_heads)),
        ba.new_empty((m, num_v_heads)),
    )


def make_inputs(
    *,
    m: int = 64,
    num_k_heads: int = 16,
    num_v_heads: int = 32,
    head_k_dim: int = 128,
    head_v_dim: int = 128,
    layout: str = "interleaved",
    row_pad: int = 0,
    ba_dtype: torch.dtype | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Return one call's arguments; with *row_pad* both tensors are slices of wider rows."""
    from hwfuse._random import Random

    random = Random(seed, device)
    width = 2 * num_k_heads * head_k_dim + 2 * num_v_heads * head_v_dim
    return {
        "qkvz": random.rows(m, width, row_pad=row_pad, dtype=dtype),
        "ba": random.rows(m, 2 * num_v_heads, row_pad=row_pad, dtype=ba_dtype or dtype),
        "head_k_dim": head_k_dim,
        "head_v_dim": head_v_dim,
        "layout": layout,
    }


# A copy has no rounding: every bit must arrive.
COMPARE: dict[str, tuple[str, dict[str, Any]]] = {
    "mixed_qkv": ("bitwise", {}),
    "z": ("bitwise", {}),
    "b": ("bitwise", {}),
    "a": ("bitwise", {}),
}

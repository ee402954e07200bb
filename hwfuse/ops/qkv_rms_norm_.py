"""Spec of qkv_rms_norm_: the in-place twin of qkv_rms_norm."""

from __future__ import annotations

import torch
from torch import Tensor

from hwfuse._errors import InputError
from hwfuse.ops import qkv_rms_norm as twin

MUTATES = ("q", "k", "v")
DIMS = twin.DIMS
COMPARE = twin.COMPARE
Sizes = twin.Sizes
make_inputs = twin.make_inputs
_ONE_ROW = 1 << 62  # the stride of a single row means nothing: as good as endless


def qkv_rms_norm_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    *,
    head_dim: int,
    eps: float = 1e-6,
) -> None:
    """Normalise each head of q, k and v in place: `qkv_rms_norm` without new memory.

    Shapes: M tokens; Hq query heads, Hkv key and value heads of D elements.

    Args:
        q: ``[M, Hq*D]`` or ``[M, Hq, D]``, bfloat16, float16 or float32.  The elements of a token
            side by side, row stride free, rows that do not overlap.  May be a slice of the same
            buffer as *k* and *v*; the three must not overlap.
        k: ``[M, Hkv*D]`` or ``[M, Hkv, D]``, dtype of *q*.  Strides as *q*.
        v: ``[M, Hkv*D]`` or ``[M, Hkv, D]``, dtype of *q*.  Strides as *q*.
        q_weight: ``[D]``, bfloat16, float16 or float32: the plain factor w.
        k_weight: ``[D]``, as *q_weight*.  v has no weight.
        head_dim: D, in elements.
        eps: added to the mean square.

    Returns:
        None.

    Writes: q, k and v; nothing between or beside their columns.

    Raises:
        InputError: as `qkv_rms_norm`; or rows of one tensor overlap, or two of the tensors do.  Two
            views of one storage are compared when their row strides are equal.

    Empty input: M = 0 writes nothing.

    Formula: that of `qkv_rms_norm`, in float32, rounded once.

    Gradient: none, inference only.

    Source: as `qkv_rms_norm`.
    """
    raise NotImplementedError


def sizes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    *,
    head_dim: int,
    eps: float = 1e-6,
) -> twin.Sizes:
    """Check a call and return its sizes."""
    result = twin.sizes(q, k, v, q_weight, k_weight, head_dim=head_dim, eps=eps)
    # A symbolic m comes from tracing, where a comparison would become a guard; the call itself is
    # checked when it runs.
    if type(result.m) is int and result.m > 0:
        widths = result.num_q_heads * head_dim, result.num_kv_heads * head_dim
        q_place = _place("q", q, widths[0], result.m)
        k_place = _place("k", k, widths[1], result.m)
        v_place = _place("v", v, widths[1], result.m)
        _check_disjoint(q_place, k_place, result.m)
        _check_disjoint(q_place, v_place, result.m)
        _check_disjoint(k_place, v_place, result.m)
    return result


def outputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    *,
    head_dim: int,
    eps: float = 1e-6,
) -> None:
    """Check a call; there is nothing to allocate."""
    sizes(q, k, v, q_weight, k_weight, head_dim=head_dim, eps=eps)


# Name, storage, offset in it, row stride, width.  Offsets and not addresses: tensors without data
# (meta, fake) have none.
_Place = tuple[str, int, int | torch.SymInt, int, int]


def _place(name: str, x: Tensor, width: int, m: int) -> _Place:
    stride = x.stride()[0] if m > 1 else _ONE_ROW
    if stride < width:
        raise InputError(f"{name}.stride(0)", stride, f"at least {width}: rows that do not overlap")
    return name, x.untyped_storage()._cdata, x.storage_offset(), stride, width


def _check_disjoint(x: _Place, y: _Place, m: int) -> None:
    x_name, x_storage, x_offset, stride, x_width = x
    y_name, y_storage, y_offset, y_stride, y_width = y
    if x_storage != y_storage or stride != y_stride:
        return
    # y begins `rows` rows below x and `columns` to the right, and may reach into the row after.
    rows, columns = (y_offset - x_offset) // stride, (y_offset - x_offset) % stride
    meets = columns < x_width and abs(rows) < m
    if meets or (columns + y_width > stride and abs(rows + 1) < m):
        raise InputError(x_name, f"memory shared with {y_name}", "tensors that do not overlap")

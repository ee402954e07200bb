"""Spec of fused_qkvbfg: the eight input projections of a Kimi delta attention layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hwfuse._checks import check, same_device
from hwfuse._errors import InputError

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DIMS = {"x": "m hidden_size", "w_qkvbfg": "n hidden_size", "w_fg": "gates p head_dim"}


def fused_qkvbfg(x: Tensor, w_qkvbfg: Tensor, w_fg: Tensor) -> tuple[Tensor, Tensor]:
    """Project x to q, k, v, beta and the two low ranks, and the low ranks on to the two gates.

    One GEMM with six stacked weights, then one batched GEMM that reads the last 2*D columns of its
    result.  `hwfuse.packing.pack_kda` makes both weights, `hwfuse.packing.split_qkvbfg` slices the
    result.

    Shapes: M tokens, C channels; h heads of D elements on this rank, p = h*D, N = 3*p + h + 2*D.
    D and h follow from *w_fg*.  D is also the rank of both gates, on every tensor parallel rank.

    Args:
        x: ``[M, C]``, bfloat16, float16 or float32.  Elements of a row side by side, row stride
            free, as in the weights.
        w_qkvbfg: ``[N, C]``, dtype of *x*.  Rows q ``[p]``, k ``[p]``, v ``[p]``, beta ``[h]``,
            low rank of the forget gate ``[D]``, low rank of the output gate ``[D]``.
        w_fg: ``[2, p, D]``, dtype of *x*: forget gate, output gate.

    Returns:
        qkvbfg: ``[M, N]``, dtype of *x*, columns in the order of the rows of *w_qkvbfg*.  Beta is a
            logit, before the sigmoid.  New contiguous memory, as all outputs.
        gates: ``[2, M, p]``, dtype of *x*: forget gate and output gate, before any activation and
            bias.

    Raises:
        InputError: *w_fg* gives no whole number of heads, *w_qkvbfg* has another number of rows
            than that needs, or an argument of another rank, dtype, device or last stride.

    Empty input: M = 0 gives empty outputs.

    Formula: ``qkvbfg = round(x @ w_qkvbfg.T)``;
    ``gates[i] = round(qkvbfg[:, N - (2 - i)*D :][:, :D] @ w_fg[i].T)``.

    Accumulation: both sums in float32, each result rounded once; the gates are computed from the
    rounded low ranks, as by separate layers.

    Source: Kimi Linear's q, k, v, b, f_a, g_a, f_b and g_b projections; SGLang's
    ``MergedColumnParallelRepeatedLinear`` and ``ColumnParallelBatchedLinear``.
    """
    raise NotImplementedError


class Sizes(NamedTuple):
    """What follows from the shapes; *n* is the width of the first result."""

    m: int
    n: int
    hidden_size: int
    num_heads: int
    head_dim: int


def sizes(x: Tensor, w_qkvbfg: Tensor, w_fg: Tensor) -> Sizes:
    """Check a call and return its sizes."""
    check("x", x, 2, DTYPES)
    same_as_x = (x.dtype,)
    check("w_qkvbfg", w_qkvbfg, 2, same_as_x)
    check("w_fg", w_fg, 3, same_as_x)
    same_device("w_qkvbfg", w_qkvbfg, "x", x)
    same_device("w_fg", w_fg, "x", x)
    m, hidden_size = x.shape
    n, w_hidden_size = w_qkvbfg.shape
    if hidden_size < 1:
        raise InputError("x.shape[1]", hidden_size, "at least 1")
    if w_hidden_size != hidden_size:
        raise InputError("w_qkvbfg.shape[1]", w_hidden_size, f"{hidden_size}, the width of x")
    num_gates, p, head_dim = w_fg.shape
    if num_gates != 2:
        raise InputError("w_fg.shape[0]", num_gates, "2: forget gate, output gate")
    if head_dim < 1:
        raise InputError("w_fg.shape[2]", head_dim, "head_dim, at least 1")
    num_heads = p // head_dim
    if p % head_dim or num_heads < 1:
        needed = f"a positive multiple of head_dim = {head_dim}, which w_fg.shape[2] gives"
        raise InputError("w_fg.shape[1]", p, needed)
    if n != 3 * p + num_heads + 2 * head_dim:
        needed = (
            f"{3 * p + num_heads + 2 * head_dim} = 3 * {p} + {num_heads} + 2 * {head_dim}"
            f" (w_fg gives num_heads = {num_heads}, head_dim = {head_dim})"
        )
        raise InputError("w_qkvbfg.shape[0]", n, needed)
    return Sizes(m, n, hidden_size, num_heads, head_dim)


def outputs(x: Tensor, w_qkvbfg: Tensor, w_fg: Tensor) -> tuple[Tensor, Tensor]:
    """Allocate the results, uninitialised."""
    m, n, _, num_heads, head_dim = sizes(x, w_qkvbfg, w_fg)
    return x.new_empty((m, n)), x.new_empty((2, m, num_heads * head_dim))


def make_inputs(
    *,
    m: int = 64,
    hidden_size: int = 2304,
    num_heads: int = 8,
    head_dim: int = 128,
    row_pad: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Return one call's arguments; the defaults are Kimi Linear 48B's on one of four ranks.

    Both products have numbers of size 1.  With *row_pad* x is a slice of wider rows.
    """
    from hwfuse._random import Random

    random = Random(seed, device)
    p = num_heads * head_dim
    n = 3 * p + num_heads + 2 * head_dim
    return {
        "x": random.rows(m, hidden_size, row_pad=row_pad, dtype=dtype),
        "w_qkvbfg": random.normal(n, hidden_size, dtype=dtype) * hidden_size**-0.5,
        "w_fg": random.normal(2, p, head_dim, dtype=dtype) * head_dim**-0.5,
    }


# The order of a float32 sum moves single roundings: at most 2e-4 measured in bfloat16.  A rounding
# too many (of partial sums) or too few (of the low ranks) gives 2.1e-3 to 3.6e-3, and would pass
# SGLang's rtol 1e-2, atol 4e-3.  In float16 it gives 3e-4: there, as in float32, this bound finds
# wrong elements, of which one in 250,000 shows.
COMPARE: dict[str, tuple[str, dict[str, Any]]] = {
    "qkvbfg": ("rel_frobenius", {"bound": 2e-3}),
    "gates": ("rel_frobenius", {"bound": 2e-3}),
}

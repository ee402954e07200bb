"""Spec of moe_unpermute_reduce: sum the rows of each token's routes, weighted."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hwfuse import _moe
from hwfuse._checks import check, same_device
from hwfuse._errors import InputError

# `rows` may have any number of rows: engines keep one buffer for the largest batch.
DIMS = {"rows": "num_rows k", "route_to_row": "m topk", "topk_weights": "m topk"}


def moe_unpermute_reduce(
    rows: Tensor,
    route_to_row: Tensor,
    topk_weights: Tensor,
    *,
    routed_scaling_factor: float = 1.0,
) -> Tensor:
    """Sum the experts' results of each token, each times the weight of its route.

    Shapes: M tokens of K elements and topk routes, R rows.

    Args:
        rows: ``[R, K]``, bfloat16, float16 or float32.  Elements of a row side by side, row stride
            free.  Rows that no route points to may hold anything, NaN too.
        route_to_row: ``[M, topk]`` int32: the row of a route, below R; -1 if it has none.
        topk_weights: ``[M, topk]`` float32.  Elements of a token side by side, row stride free.
        routed_scaling_factor: multiplies the sum.  1.0 if the model multiplies itself, as it does
            when results of other ranks are added first.

    Returns:
        out: ``[M, K]``, dtype of *rows*, contiguous.  Exactly 0 for a token without valid routes.

    Raises:
        InputError: rows have no columns, topk is 0, tensors of different length, or an argument of
            another rank, dtype, device or last stride.

    Empty input: M = 0 gives an empty output.

    Formula: ``out[t] = routed_scaling_factor * sum over valid routes j of topk_weights[t, j] *
    rows[route_to_row[t, j]]``.

    Accumulation: in float32, rounded once.

    Gradient: none, inference only.

    Source: SGLang ``post_reorder_for_cutlass_moe``.
    """
    raise NotImplementedError


class Sizes(NamedTuple):
    """What follows from the shapes."""

    m: int
    k: int
    topk: int


def sizes(
    rows: Tensor,
    route_to_row: Tensor,
    topk_weights: Tensor,
    *,
    routed_scaling_factor: float = 1.0,
) -> Sizes:
    """Check a call and return its sizes."""
    check("rows", rows, 2, _moe.FLOATS)
    k = rows.shape[1]
    if not k:
        raise InputError("rows.shape[1]", k, "at least 1")
    topk = _moe.check_routes("route_to_row", route_to_row, "rows", rows)
    check("topk_weights", topk_weights, 2, (torch.float32,))
    if topk_weights.shape != route_to_row.shape:
        needed = f"{tuple(route_to_row.shape)}, as route_to_row"
        raise InputError("topk_weights.shape", tuple(topk_weights.shape), needed)
    same_device("topk_weights", topk_weights, "rows", rows)
    return Sizes(route_to_row.shape[0], k, topk)


def outputs(
    rows: Tensor,
    route_to_row: Tensor,
    topk_weights: Tensor,
    *,
    routed_scaling_factor: float = 1.0,
) -> Tensor:
    """Allocate the result, uninitialised."""
    m, k, _ = sizes(rows, route_to_row, topk_weights, routed_scaling_factor=routed_scaling_factor)
    return rows.new_empty((m, k))


def make_inputs(
    *,
    m: int = 64,
    k: int = 7168,
    topk: int = 8,
    num_rows: int | None = None,
    routed_scaling_factor: float = 2.5,
    row_pad: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Return one call's arguments; *num_rows* is m * topk unless given.

    Rows that no route points to are NaN; every fourth token from the third on has no valid route.
    """
    num_rows = m * topk if num_rows is None else num_rows
    if num_rows < m * topk:
        raise InputError("num_rows", num_rows, f"at least m * topk = {m * topk}")
    from hwfuse._random import Random

    random = Random(seed, device)
    route_to_row = _moe.make_route_to_row(random, m, topk)
    return {
        "rows": _moe.make_rows(random, num_rows, k, route_to_row, row_pad=row_pad, dtype=dtype),
        "route_to_row": route_to_row,
        "topk_weights": random.normal(m, topk).abs(),
        "routed_scaling_factor": routed_scaling_factor,
    }


# The order of the float32 sum is free, which changes few roundings to 16 bits: 1e-5 or less.  A sum
# or weights in bfloat16 give 2e-3 and more.
COMPARE: dict[str, tuple[str, dict[str, Any]]] = {"out": ("rel_frobenius", {"bound": 5e-4})}

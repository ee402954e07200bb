"""Spec of w4a8_moe_prep: sort the routes of a mixture of experts by expert."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hwfuse._checks import check
from hwfuse._errors import InputError

DIMS = {"topk_ids": "m topk"}


def w4a8_moe_prep(
    topk_ids: Tensor,
    *,
    num_experts: int,
    n: int,
    k: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Plan the grouped GEMMs of a w4a8 mixture of experts: where each route's row goes.

    A route is one entry of *topk_ids*: token t sent to an expert.  It is valid if
    0 <= id < num_experts; others (-1, or an expert of another rank) get no row.  The rows of expert
    e are ``expert_offsets[e]`` up to ``expert_offsets[e + 1]``, one for each valid route to it.

    Shapes: M tokens of topk routes, E experts on this rank, N the intermediate size, K the hidden
    size.

    Args:
        topk_ids: ``[M, topk]`` int32, any values.  Entries of a token side by side, row stride
            free.
        num_experts: E, at least 1.
        n: N, a positive multiple of 128.
        k: K, a positive multiple of 128.

    Returns:
        expert_offsets: ``[E + 1]`` int32, from 0 to the number of valid routes.  New contiguous
            memory, as all outputs.
        problem_sizes1: ``[E, 3]`` int32: (2N, rows of e, K), weight rows first.
        problem_sizes2: ``[E, 3]`` int32: (K, rows of e, N).
        route_to_row: ``[M, topk]`` int32: the row of a route, -1 if it is not valid.
        row_to_token: ``[M*topk]`` int32: the token of a row, 0 past ``expert_offsets[E]``.
        The order of an expert's rows is free; the two maps agree on it.

    Raises:
        InputError: topk, num_experts, n or k out of range, or topk_ids of another rank, dtype or
            last stride.

    Empty input: M = 0 gives offsets of 0, problem sizes without rows and empty maps.

    Gradient: none, the results are integers.

    Graph capture: no host synchronisation.

    Source: SGLang ``get_cutlass_w4a8_moe_mm_data`` and ``cutlass_prepare_moe_input``.
    """
    raise NotImplementedError


class Sizes(NamedTuple):
    """What follows from the shape of topk_ids."""

    m: int
    topk: int


def sizes(topk_ids: Tensor, *, num_experts: int, n: int, k: int) -> Sizes:
    """Check a call and return its sizes."""
    check("topk_ids", topk_ids, 2, (torch.int32,))
    m, topk = topk_ids.shape
    if not topk:
        raise InputError("topk_ids.shape[1]", topk, "at least 1")
    if num_experts < 1:
        raise InputError("num_experts", num_experts, "at least 1")
    if n < 1 or n % 128:
        raise InputError("n", n, "a positive multiple of 128")
    if k < 1 or k % 128:
        raise InputError("k", k, "a positive multiple of 128")
    return Sizes(m, topk)


def outputs(
    topk_ids: Tensor, *, num_experts: int, n: int, k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Allocate the results, uninitialised."""
    m, topk = sizes(topk_ids, num_experts=num_experts, n=n, k=k)
    return (
        topk_ids.new_empty(num_experts + 1),
        topk_ids.new_empty((num_experts, 3)),
        topk_ids.new_empty((num_experts, 3)),
        topk_ids.new_empty((m, topk)),
        topk_ids.new_empty(m * topk),
    )


def make_inputs(
    *,
    m: int = 64,
    topk: int = 8,
    num_experts: int = 32,
    n: int = 2048,
    k: int = 7168,
    dtype: torch.dtype = torch.int32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Return one call's arguments: ids from -1 to num_experts, so both kinds of invalid occur.

    Every fourth token from the second on sends all its routes to the last expert; every fourth
    from the third on sends them to other ranks.
    """
    from hwfuse._random import Random

    random = Random(seed, device)
    topk_ids = random.integers(-1, num_experts + 1, m, topk, dtype=dtype)
    topk_ids[1::4] = num_experts - 1
    topk_ids[2::4] = -1
    return {"topk_ids": topk_ids, "num_experts": num_experts, "n": n, "k": k}


# Integers are exact; only the order inside an expert is free, because kernels hand out rows by
# atomics.  So each expert has the reference's rows in any order, and the second map inverts the
# first.
COMPARE: dict[str, tuple[str, dict[str, Any]]] = {
    "expert_offsets": ("bitwise", {}),
    "problem_sizes1": ("bitwise", {}),
    "problem_sizes2": ("bitwise", {}),
    "route_to_row": ("same_sets", {"groups": "topk_ids"}),
    "row_to_token": ("inverse", {"of": "route_to_row"}),
}

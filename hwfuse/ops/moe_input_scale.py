"""Spec of moe_input_scale: one fp8 scale for all tokens that this rank's experts read."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hwfuse import _moe
from hwfuse._checks import check
from hwfuse._errors import InputError
from hwfuse._random import Random
from hwfuse.ops import w4a8_moe_prep

DIMS = {"x": "m k", "topk_ids": "m topk"}


def moe_input_scale(
    x: Tensor,
    topk_ids: Tensor,
    *,
    num_experts: int,
) -> Tensor:
    """Return the scale that makes the largest number of all tokens with a valid route QMAX.

    A route, one entry of *topk_ids*, is valid if 0 <= id < num_experts.  Tokens with no valid route
    are other ranks': whatever they hold, NaN too, is ignored.

    Shapes: M tokens of K elements and topk routes.  QMAX is 448, of float8_e4m3fn.

    Args:
        x: ``[M, K]``, bfloat16, float16 or float32.  Elements of a row side by side, row stride
            free.
        topk_ids: ``[M, topk]`` int32, any values.  Entries of a token side by side, row stride
            free.
        num_experts: E, at least 1.

    Returns:
        scale: ``[1]`` float32.

    Raises:
        InputError: x has no columns, topk or num_experts below 1, tensors of different length, or
            an argument of another rank, dtype, device or last stride.

    Empty input: M = 0 gives the floor, as do tokens without any valid route.

    Formula: ``max(amax(|x|), 1e-10) / 448`` over the tokens with a valid route; NaN if one of those
    has a NaN.

    Gradient: none, inference only.

    Graph capture: no host synchronisation.

    Source: SGLang ``cutlass_w4a8_moe`` without ``a1_scale``.
    """
    raise NotImplementedError


class Sizes(NamedTuple):
    """What follows from the shapes."""

    m: int
    k: int
    topk: int


def sizes(
    x: Tensor,
    topk_ids: Tensor,
    *,
    num_experts: int,
) -> Sizes:
    """Check a call and return its sizes."""
    check("x", x, 2, _moe.FLOATS)
    m, k = x.shape
    if not k:
        raise InputError("x.shape[1]", k, "at least 1")
    topk = _moe.check_routes("topk_ids", topk_ids, "x", x)
    if topk_ids.shape[0] != m:
        raise InputError("topk_ids.shape[0]", topk_ids.shape[0], f"{m}, the number of rows of x")
    if num_experts < 1:
        raise InputError("num_experts", num_experts, "at least 1")
    return Sizes(m, k, topk)


def outputs(
    x: Tensor,
    topk_ids: Tensor,
    *,
    num_experts: int,
) -> Tensor:
    """Allocate the result, uninitialised."""
    sizes(x, topk_ids, num_experts=num_experts)
    return x.new_empty(1, dtype=torch.float32)


def make_inputs(
    *,
    m: int = 64,
    k: int = 7168,
    topk: int = 8,
    num_experts: int = 32,
    row_pad: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Return one call's arguments; every fourth token from the third on is remote, and NaN."""
    prep = w4a8_moe_prep.make_inputs(
        m=m, topk=topk, num_experts=num_experts, device=device, seed=seed
    )
    x = Random(seed, device).rows(m, k, row_pad=row_pad, dtype=dtype)
    x[2::4] = float("nan")
    return {"x": x, "topk_ids": prep["topk_ids"], "num_experts": num_experts}


# A maximum is exact; the one division has fast forms that are off by an ulp or two.
COMPARE: dict[str, tuple[str, dict[str, Any]]] = {"scale": ("ulps", {"max_ulps": 8, "share": 1.0})}

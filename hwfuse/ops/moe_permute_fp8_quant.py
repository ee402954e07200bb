"""Spec of moe_permute_fp8_quant: copy each token, as fp8, to the rows of its routes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hwfuse import _moe
from hwfuse._checks import check
from hwfuse._errors import InputError

DIMS = {"x": "m k", "route_to_row": "m topk"}


def moe_permute_fp8_quant(
    x: Tensor,
    route_to_row: Tensor,
    scale: Tensor,
) -> Tensor:
    """Quantise tokens to fp8 with one scale and lay them in the rows that their routes point to.

    Shapes: M tokens of K elements and topk routes.

    Args:
        x: ``[M, K]``, bfloat16, float16 or float32.  Elements of a row side by side, row stride
            free.
        route_to_row: ``[M, topk]`` int32, as `w4a8_moe_prep` returns it: the row of a route, -1 if
            it has none.  V valid routes have the rows 0 to V - 1, each once.
        scale: ``[1]`` float32: the factor that restores x.

    Returns:
        rows: ``[M*topk, K]`` float8_e4m3fn, contiguous.  Rows V and up are unspecified.

    Raises:
        InputError: x has no columns, topk is 0, tensors of different length, or an argument of
            another rank, dtype, device or last stride.

    Empty input: M = 0 gives no rows.

    Formula: ``fp8(clamp(x * (1 / scale), -448, 448))`` in float32, rounded once.  The clamp is
    explicit, and NaN stays NaN.

    Gradient: none, inference only.

    Graph capture: no host synchronisation is needed.

    Source: SGLang ``pre_reorder_for_cutlass_moe``.
    """
    raise NotImplementedError


class Sizes(NamedTuple):
    """What follows from the shapes."""

    m: int
    k: int
    topk: int


def sizes(
    x: Tensor,
    route_to_row: Tensor,
    scale: Tensor,
) -> Sizes:
    """Check a call and return its sizes."""
    check("x", x, 2, _moe.FLOATS)
    m, k = x.shape
    if not k:
        raise InputError("x.shape[1]", k, "at least 1")
    topk = _moe.check_routes("route_to_row", route_to_row, "x", x)
    num_tokens = route_to_row.shape[0]
    if num_tokens != m:
        raise InputError("route_to_row.shape[0]", num_tokens, f"{m}, the number of rows of x")
    _moe.check_scale("scale", scale, "x", x)
    return Sizes(m, k, topk)


def outputs(
    x: Tensor,
    route_to_row: Tensor,
    scale: Tensor,
) -> Tensor:
    """Allocate the result, uninitialised."""
    m, k, topk = sizes(x, route_to_row, scale)
    return x.new_empty((m * topk, k), dtype=_moe.FP8)


def make_inputs(
    *,
    m: int = 64,
    k: int = 7168,
    topk: int = 8,
    row_pad: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Return one call's arguments; numbers beyond two deviations are out of the scale's range."""
    from hwfuse._random import Random

    random = Random(seed, device)
    return {
        "x": random.rows(m, k, row_pad=row_pad, dtype=dtype),
        "route_to_row": _moe.make_route_to_row(random, m, topk),
        "scale": (random.normal(1).abs() + 2) / 448,
    }


# x * (1/s) and x / s differ in the last bit of float32, which on rare ties is one fp8 code.
COMPARE: dict[str, tuple[str, dict[str, Any]]] = {
    "rows": ("fp8_codes", {"max_codes": 1, "share": 1e-3, "valid_rows": "route_to_row"}),
}

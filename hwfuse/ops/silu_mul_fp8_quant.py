"""Spec of silu_mul_fp8_quant: the gated activation between the GEMMs of a w4a8 mixture."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hwfuse import _moe
from hwfuse._checks import check
from hwfuse._errors import InputError

DIMS = {"rows": "m w", "expert_offsets": "num_offsets"}


def silu_mul_fp8_quant(
    rows: Tensor,
    scale: Tensor,
    expert_offsets: Tensor,
) -> Tensor:
    """Multiply the second half of each row by the SiLU of the first; quantise with one scale.

    Shapes: M rows of 2N elements, of which the first V = expert_offsets[E] are in use; E experts.

    Args:
        rows: ``[M, 2N]``, bfloat16, float16 or float32: gate ``[N]``, then up ``[N]``.  Elements of
            a row side by side, row stride free.  Rows V and up may hold anything.
        scale: ``[1]`` float32: the factor that restores the product.
        expert_offsets: ``[E + 1]`` int32, as `w4a8_moe_prep` returns it.

    Returns:
        q: ``[M, N]`` float8_e4m3fn, contiguous.  Rows V and up are unspecified.

    Raises:
        InputError: an odd or zero width, fewer than 2 offsets, or an argument of another rank,
            dtype, device or last stride.

    Empty input: M = 0 gives no rows.

    Formula: ``y = gate / (1 + exp(-gate)) * up`` and ``fp8(clamp(y * (1 / scale), -448, 448))``,
    all in float32, rounded once.  The clamp is explicit, and NaN stays NaN.

    Gradient: none, inference only.

    Source: SGLang ``silu_mul_static_tensorwise_quant_for_cutlass_moe``.
    """
    raise NotImplementedError


class Sizes(NamedTuple):
    """What follows from the shapes; m counts all rows, those not in use too."""

    m: int
    n: int
    num_experts: int


def sizes(
    rows: Tensor,
    scale: Tensor,
    expert_offsets: Tensor,
) -> Sizes:
    """Check a call and return its sizes."""
    check("rows", rows, 2, _moe.FLOATS)
    m, width = rows.shape
    if width % 2 or not width:
        raise InputError("rows.shape[1]", width, "a positive even number: gate and up")
    _moe.check_scale("scale", scale, "rows", rows)
    return Sizes(m, width // 2, _moe.check_offsets(expert_offsets, "rows", rows))


def outputs(
    rows: Tensor,
    scale: Tensor,
    expert_offsets: Tensor,
) -> Tensor:
    """Allocate the result, uninitialised."""
    m, n, _ = sizes(rows, scale, expert_offsets)
    return rows.new_empty((m, n), dtype=_moe.FP8)


def make_inputs(
    *,
    m: int = 512,
    n: int = 2048,
    num_experts: int = 32,
    row_pad: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Return one call's arguments; rows that are not in use are NaN, large products clamped."""
    from hwfuse._random import Random

    random = Random(seed, device)
    expert_offsets = _moe.make_offsets(random, m, num_experts)
    return {
        "rows": _moe.make_rows(random, m, 2 * n, expert_offsets, row_pad=row_pad, dtype=dtype),
        "scale": (random.normal(1).abs() + 2) / 448,
        "expert_offsets": expert_offsets,
    }


# The exp of hardware is off by a few 1e-7 of it and some kernels divide by the scale: on rare ties
# one code.  Rounding the SiLU to bfloat16 first moves some per cent of the codes.
COMPARE: dict[str, tuple[str, dict[str, Any]]] = {
    "q": ("fp8_codes", {"max_codes": 1, "share": 1e-3, "valid_rows": "expert_offsets"}),
}

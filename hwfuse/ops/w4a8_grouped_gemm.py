"""Spec of w4a8_grouped_gemm: fp8 rows times the int4 weight of their expert."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hwfuse import _moe, packing
from hwfuse._checks import check, same_device
from hwfuse._errors import InputError
from hwfuse.packing import w4a8

if TYPE_CHECKING:
    from hwfuse._random import Random


GROUP = 128
DIMS = {"a": "m k", "expert_offsets": "num_offsets"}  # b and b_scale have two ranks


def w4a8_grouped_gemm(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    expert_offsets: Tensor,
) -> Tensor:
    """Multiply the fp8 rows of each expert by its transposed int4 weight.

    Shapes: M rows of K elements, sorted by expert; E experts with weights of N rows; G = K / 128
    groups.  Expert e has the rows ``expert_offsets[e]`` up to ``expert_offsets[e + 1]``, or none.

    Args:
        a: ``[M, K]`` float8_e4m3fn.  Elements of a row side by side, row stride free.  Rows from
            ``expert_offsets[E]`` on may hold anything.
        a_scale: ``[1]`` float32: the factor that restores a.
        b: int8.  Plain ``[E, N, K/2]``: two numbers from -8 to 7 to a byte, two's complement.  The
            low four bits of byte i are element 2i of the row, the high four element 2i + 1.
            Elements of a row side by side.  Or ``[E, N/64, K/128, 4224]``, the blocks of
            `hwfuse.packing.repack_w4a8`, which hold the scales too.
        b_scale: bfloat16, any sign: one factor s[e, n, g] for 128 elements of a row of the weight.
            ``[E, G/i, N*i]`` with element ``[e, g // i, n*i + g % i]`` = s[e, n, g]; i is 4 or 1,
            as the shape says.  Elements of a row side by side.  ``[0]`` if b is repacked.
        expert_offsets: ``[E + 1]`` int32, not descending, as `w4a8_moe_prep` returns it.

    Returns:
        rows: ``[M, N]`` bfloat16, contiguous.  Rows from ``expert_offsets[E]`` on are unspecified.

    Raises:
        InputError: K is not a positive multiple of 128, shapes that do not fit each other, or an
            argument of another rank, dtype, device or last stride.

    Empty input: M = 0 gives no rows.

    Formula: ``rows[m, n] = a_scale * sum over g of s[e, n, g] * (sum over the group of a[m, k] *
    w[e, n, k])``.

    Accumulation: both sums in float32, rounded once.  bfloat16 because real models exceed float16.

    Gradient: none, inference only.

    Source: SGLang ``cutlass_w4a8_moe_mm``.
    """
    raise NotImplementedError


class Sizes(NamedTuple):
    """What follows from the shapes; m counts all rows, those of no expert too.

    interleave is 0 if the weight is repacked.
    """

    m: int
    n: int
    k: int
    num_experts: int
    interleave: int


def sizes(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    expert_offsets: Tensor,
) -> Sizes:
    """Check a call and return its sizes."""
    check("a", a, 2, (_moe.FP8,))
    m, k = a.shape
    if k % GROUP or not k:
        raise InputError("a.shape[1]", k, f"a positive multiple of {GROUP}")
    _moe.check_scale("a_scale", a_scale, "a", a)
    num_experts, n, interleave = check_weight("b", b, b_scale, k)
    same_device("b", b, "a", a)
    same_device("b_scale", b_scale, "a", a)
    if _moe.check_offsets(expert_offsets, "a", a) != num_experts:
        needed = f"{num_experts + 1}, one more than the experts of b"
        raise InputError("expert_offsets.shape[0]", expert_offsets.shape[0], needed)
    return Sizes(m, n, k, num_experts, interleave)


def outputs(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    expert_offsets: Tensor,
) -> Tensor:
    """Allocate the result, uninitialised."""
    m, n, *_ = sizes(a, a_scale, b, b_scale, expert_offsets)
    return a.new_empty((m, n), dtype=torch.bfloat16)


def make_inputs(
    *,
    m: int = 512,
    n: int = 4096,
    k: int = 7168,
    num_experts: int = 32,
    interleave: int | None = None,
    is_repacked: bool = False,
    row_pad: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Return one call's arguments; *dtype* is the result's, *interleave* None 4 where it can be.

    Rows of no expert are NaN.  Signed scales that differ by group and row of the weight: neither a
    permuted scale nor swapped nibbles can pass for the right ones.
    """
    if dtype != torch.bfloat16:
        raise InputError("dtype", dtype, "torch.bfloat16")
    from hwfuse._random import Random

    random = Random(seed, device)
    expert_offsets = _moe.make_offsets(random, m, num_experts)
    b, b_scale = make_weight(random, num_experts, n, k, interleave)
    if is_repacked:
        b, b_scale = packing.repack_w4a8(b, b_scale)
    return {
        "a": _moe.make_rows(random, m, k, expert_offsets, row_pad=row_pad, dtype=_moe.FP8),
        "a_scale": random.normal(1).abs() + 0.5,
        "b": b,
        "b_scale": b_scale,
        "expert_offsets": expert_offsets,
    }


# The products are exact and their order is free; tensor cores keep about 14 bits of a sum of 128,
# which moves some per cent of the roundings to bfloat16: 1e-3.  A misplaced scale gives 1.
COMPARE: dict[str, tuple[str, dict[str, Any]]] = {
    "rows": ("rel_frobenius", {"bound": 2e-3, "valid_rows": "expert_offsets"}),
}


def check_weight(name: str, b: Tensor, b_scale: Tensor, k: int) -> tuple[int, int, int]:
    """Check an int4 weight and its scale; return number of experts, N and interleave."""
    if b.ndim == 4:
        return *_check_repacked(name, b, b_scale, k), 0
    check(name, b, 3, (torch.int8,))
    num_experts, n, width = b.shape
    if not num_experts or not n or width != k // 2:
        needed = f"[experts, rows, {k // 2}]: two of {k} numbers to a byte"
        raise InputError(f"{name}.shape", tuple(b.shape), needed)
    check(f"{name}_scale", b_scale, 3, (torch.bfloat16,))
    num_groups = k // GROUP
    plain, by_four = (num_experts, num_groups, n), (num_experts, num_groups // 4, 4 * n)
    if b_scale.shape == plain:
        return num_experts, n, 1
    if num_groups % 4 or b_scale.shape != by_four:
        needed = f"{plain}" if num_groups % 4 else f"{by_four}, interleaved by 4, or {plain}"
        raise InputError(f"{name}_scale.shape", tuple(b_scale.shape), needed)
    return num_experts, n, 4


def _check_repacked(name: str, b: Tensor, b_scale: Tensor, k: int) -> tuple[int, int]:
    check(name, b, 4, (torch.int8,))
    num_experts, row_blocks, *block = b.shape
    if not num_experts or not row_blocks or block != [k // GROUP, w4a8.BYTES]:
        needed = f"[experts, rows / {w4a8.ROWS}, {k // GROUP}, {w4a8.BYTES}], repacked"
        raise InputError(f"{name}.shape", tuple(b.shape), needed)
    check(f"{name}_scale", b_scale, 1, (torch.bfloat16,))
    if b_scale.shape[0]:
        needed = f"(0,): a repacked {name} holds the scales"
        raise InputError(f"{name}_scale.shape", tuple(b_scale.shape), needed)
    return num_experts, row_blocks * w4a8.ROWS


def make_weight(
    random: Random, num_experts: int, n: int, k: int, interleave: int | None
) -> tuple[Tensor, Tensor]:
    """Return a packed int4 weight ``[E, N, K/2]`` and its scale."""
    num_groups = k // GROUP
    i = interleave or (1 if num_groups % 4 else 4)
    if i not in (1, 4) or num_groups % i:
        raise InputError("interleave", interleave, "1, or 4 if k is a multiple of 512")
    shape = (num_experts, num_groups // i, n * i)
    exponents = random.integers(-2, 3, *shape, dtype=torch.float32)
    scale = 0.005 * random.normal(*shape) * exponents.exp2()
    return random.integers(-128, 128, num_experts, n, k // 2, dtype=torch.int8), scale.bfloat16()

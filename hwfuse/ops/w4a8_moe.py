"""Spec of w4a8_moe: a whole mixture of experts with int4 weights and fp8 activations."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hwfuse import _moe, packing
from hwfuse._checks import check, same_device
from hwfuse._errors import InputError
from hwfuse.ops import w4a8_grouped_gemm, w4a8_moe_prep

DIMS = {
    "x": "m k",
    "topk_ids": "m topk",
    "topk_weights": "m topk",
}  # the weights have two ranks


def w4a8_moe(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w13: Tensor,
    w13_scale: Tensor,
    w2: Tensor,
    w2_scale: Tensor,
    a1_scale: Tensor,
    a2_scale: Tensor,
    *,
    routed_scaling_factor: float = 1.0,
) -> Tensor:
    """Send each token through the gated MLPs of its experts and sum the results, weighted.

    The ops `w4a8_moe_prep`, `moe_input_scale`, `moe_permute_fp8_quant`, `w4a8_grouped_gemm`,
    `silu_mul_fp8_quant` and `moe_unpermute_reduce` in one, so that one kernel can do all of it.

    A route, one entry of *topk_ids*, is valid if it names one of the E experts here; others (-1, or
    an expert of another rank) add nothing.

    Shapes: M tokens of K elements and topk routes; E experts of intermediate size N.  K and N are
    multiples of 128.

    Args:
        x: ``[M, K]`` bfloat16.  Elements of a row side by side, row stride free.  Tokens without
            valid routes may hold anything, NaN too.
        topk_ids: ``[M, topk]`` int32, any values.  Entries of a token side by side, row stride
            free.
        topk_weights: ``[M, topk]`` float32, strides as *topk_ids*.
        w13: ``[E, 2N, K/2]`` int8: the rows of gate, then those of up, packed as the b of
            `w4a8_grouped_gemm`; or repacked likewise, ``[E, N/32, K/128, 4224]``.
        w13_scale: bfloat16, the b_scale of *w13*.
        w2: ``[E, K, N/2]`` int8, packed likewise; or repacked, ``[E, K/64, N/128, 4224]``.
        w2_scale: bfloat16, the b_scale of *w2*.
        a1_scale: float32, of x: ``[1]``, the scale of the checkpoint (static), or ``[0]``, the op
            computes it from the tokens of the call (dynamic).
        a2_scale: float32, of the gated activation: ``[1]`` or ``[0]``, as *a1_scale*.
        routed_scaling_factor: multiplies the result.  1.0 if the model multiplies itself, as it
            does when results of other ranks are added first.

    Returns:
        out: ``[M, K]`` bfloat16, contiguous.  Exactly 0 for a token without valid routes.

    Raises:
        InputError: K or N is not a positive multiple of 128, shapes that do not fit each other, or
            an argument of another rank, dtype, device or last stride.

    Empty input: M = 0 gives an empty output.

    Formula: ``s1 = a1_scale``, dynamic `moe_input_scale`; ``q1 = fp8(clamp(x / s1))``;
    ``c1 = bfloat16(s1 * q1 @ w13.T)``; ``h = silu(gate) * up`` of the halves of c1, in float32;
    ``s2 = a2_scale``, dynamic ``max(amax(|h|), 1e-10) / 448`` over all valid routes;
    ``q2 = fp8(clamp(h / s2))``; ``c2 = bfloat16(s2 * q2 @ w2.T)``; ``out = routed_scaling_factor *
    sum over valid routes of topk_weights * c2``, rounded once.

    Accumulation: all sums in float32.

    Expert parallel: each rank passes ids outside of its experts and the results are added up.  Give
    static scales then: a rank that computes them sees its own routes only (5 % apart in a test).

    Gradient: none, inference only.

    Source: SGLang ``cutlass_w4a8_moe``.
    """
    raise NotImplementedError


class Sizes(NamedTuple):
    """What follows from the shapes."""

    m: int
    n: int
    k: int
    topk: int
    num_experts: int


def sizes(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w13: Tensor,
    w13_scale: Tensor,
    w2: Tensor,
    w2_scale: Tensor,
    a1_scale: Tensor,
    a2_scale: Tensor,
    *,
    routed_scaling_factor: float = 1.0,
) -> Sizes:
    """Check a call and return its sizes."""
    check("x", x, 2, (torch.bfloat16,))
    m, k = x.shape
    if k % w4a8_grouped_gemm.GROUP or not k:
        raise InputError("x.shape[1]", k, f"a positive multiple of {w4a8_grouped_gemm.GROUP}")
    topk = _moe.check_routes("topk_ids", topk_ids, "x", x)
    if topk_ids.shape[0] != m:
        raise InputError("topk_ids.shape[0]", topk_ids.shape[0], f"{m}, the number of rows of x")
    check("topk_weights", topk_weights, 2, (torch.float32,))
    if topk_weights.shape != topk_ids.shape:
        needed = f"{tuple(topk_ids.shape)}, as topk_ids"
        raise InputError("topk_weights.shape", tuple(topk_weights.shape), needed)
    same_device("topk_weights", topk_weights, "x", x)
    num_experts, double_n, _ = w4a8_grouped_gemm.check_weight("w13", w13, w13_scale, k)
    n = double_n // 2
    if double_n % (2 * w4a8_grouped_gemm.GROUP):
        raise InputError("w13.shape[1]", double_n, "2n, n a multiple of 128: gate and up")
    if w4a8_grouped_gemm.check_weight("w2", w2, w2_scale, n)[:2] != (num_experts, k):
        needed = f"({num_experts}, {k}, {n // 2}): experts of w13, width of x, n/2"
        raise InputError("w2.shape", tuple(w2.shape), needed)
    for name, weight in (
        ("w13", w13),
        ("w13_scale", w13_scale),
        ("w2", w2),
        ("w2_scale", w2_scale),
    ):
        same_device(name, weight, "x", x)
    _check_activation_scale("a1_scale", a1_scale, x)
    _check_activation_scale("a2_scale", a2_scale, x)
    return Sizes(m, n, k, topk, num_experts)


def outputs(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w13: Tensor,
    w13_scale: Tensor,
    w2: Tensor,
    w2_scale: Tensor,
    a1_scale: Tensor,
    a2_scale: Tensor,
    *,
    routed_scaling_factor: float = 1.0,
) -> Tensor:
    """Allocate the result, uninitialised."""
    sizes(
        x,
        topk_ids,
        topk_weights,
        w13,
        w13_scale,
        w2,
        w2_scale,
        a1_scale,
        a2_scale,
        routed_scaling_factor=routed_scaling_factor,
    )
    return x.new_empty(x.shape)


def make_inputs(
    *,
    m: int = 64,
    n: int = 2048,
    k: int = 7168,
    topk: int = 8,
    num_experts: int = 32,
    interleave: int | None = None,
    is_repacked: bool = False,
    is_dynamic: bool = False,
    routed_scaling_factor: float = 2.5,
    row_pad: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Return one call's arguments; *interleave* is that of the scales, None 4 where it can be.

    Every fourth token from the third on is another rank's, and NaN.
    """
    from hwfuse._random import Random

    random = Random(seed, device)
    prep = w4a8_moe_prep.make_inputs(
        m=m, topk=topk, num_experts=num_experts, device=device, seed=seed
    )
    x = random.rows(m, k, row_pad=row_pad, dtype=dtype)
    x[2::4] = float("nan")
    w13, w13_scale = w4a8_grouped_gemm.make_weight(random, num_experts, 2 * n, k, interleave)
    w2, w2_scale = w4a8_grouped_gemm.make_weight(random, num_experts, k, n, interleave)
    if is_repacked:
        w13, w13_scale = packing.repack_w4a8(w13, w13_scale)
        w2, w2_scale = packing.repack_w4a8(w2, w2_scale)
    # Gate and up have a deviation of 0.03 * sqrt(k); both scales clamp a few numbers.
    static = torch.tensor([3 / 448, 1e-3 * k / 448])
    a1_scale, a2_scale = (s[:0] if is_dynamic else s for s in static.to(random.device).split(1))
    return {
        "x": x,
        "topk_ids": prep["topk_ids"],
        "topk_weights": random.normal(m, topk).abs(),
        "w13": w13,
        "w13_scale": w13_scale,
        "w2": w2,
        "w2_scale": w2_scale,
        "a1_scale": a1_scale,
        "a2_scale": a2_scale,
        "routed_scaling_factor": routed_scaling_factor,
    }


# Sums in another order move c1 by an ulp here and there, and with it some codes of q2 by one; each
# is one of n terms.  1e-2 is upstream's tolerance for the whole.  A computed a2_scale follows from
# the one largest number of c1: an ulp of it, 0.4 % in bfloat16, moves codes all over q2.
COMPARE: dict[str, tuple[str, dict[str, Any]]] = {
    "out": ("rel_frobenius", {"bound": 1e-2, "scale": "a2_scale", "computed": 3e-2})
}


def _check_activation_scale(name: str, scale: Tensor, x: Tensor) -> None:
    check(name, scale, 1, (torch.float32,))
    if scale.shape[0] > 1:
        raise InputError(f"{name}.shape", tuple(scale.shape), "(1,), or (0,): computed by the op")
    same_device(name, scale, "x", x)

"""Spec of fp8_blockscale_gemm: an fp8 matrix product whose scales belong to blocks of 128."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hwfuse import layouts
from hwfuse._checks import check, same_device
from hwfuse._device import fp8_dtype
from hwfuse._errors import InputError

BLOCK = 128
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
OUT_DTYPES = (torch.bfloat16, torch.float16)
# b has two ranks; a_scale is narrower when packed.
DIMS = {"a": "m k", "a_scale": "m w_scale", "b_scale": "n_blocks k_blocks"}


def fp8_blockscale_gemm(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Multiply fp8 activations by a transposed fp8 weight, each block with its scale.

    Shapes: M rows, N output columns, K contracted; G = K / 128 blocks along K.  K is a multiple of
    128; N is any number, the last of its blocks of 128 may be short.

    Args:
        a: ``[M, K]``, float8_e4m3fn or float8_e4m3fnuz.  Elements of a row side by side, row
            stride free.
        a_scale: one factor for each row and block of 128 elements of *a*: float32 ``[M, G]``, or
            int32 ``[M, ceil(G/4)]`` of packed exponents (``ue8m0_packed``).  Strides are read as
            they are; `hwfuse.layouts` names those that implementations ask for.
        b: the weight, dtype of *a*: plain ``[N, K]``, strides as *a*; or ``[N/16, K/32, 2, 16,
            16]``, contiguous, as `hwfuse.packing.preshuffle_16x16` returns it.
        b_scale: ``[ceil(N/128), G]`` float32: one factor for each block of 128x128 of the plain
            weight.  Elements of a row side by side.
        out_dtype: bfloat16 or float16.

    Returns:
        out: ``[M, N]`` of *out_dtype*, contiguous.

    Raises:
        InputError: K is not a positive multiple of 128, shapes that do not fit each other, or an
            argument of another rank, dtype, device or stride.

    Empty input: M = 0 gives an empty output.

    Formula: ``out[m, n] = sum over g of a_scale[m, g] * b_scale[n // 128, g] * (sum over the block
    of a[m, k] * b[n, k])``.

    Accumulation: both sums in float32, rounded once.

    Gradient: none, inference only.

    Source: DeepGEMM ``fp8_gemm_nt``, aiter ``gemm_a8w8_blockscale`` and, preshuffled,
    ``gemm_a8w8_blockscale_bpreshuffle``.
    """
    raise NotImplementedError


class Sizes(NamedTuple):
    """What follows from the shapes."""

    m: int
    n: int
    k: int


def sizes(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Sizes:
    """Check a call and return its sizes."""
    check("a", a, 2, FP8_DTYPES)
    m, k = a.shape
    if k % BLOCK or not k:
        raise InputError("a.shape[1]", k, f"a positive multiple of {BLOCK}")
    n = _rows_of_b(b, k)
    if b.dtype != a.dtype:
        raise InputError("b.dtype", b.dtype, f"{a.dtype}, as a")
    _check_a_scale(a_scale, m, k // BLOCK)
    check("b_scale", b_scale, 2, (torch.float32,))
    blocks = ((n + BLOCK - 1) // BLOCK, k // BLOCK)
    if b_scale.shape != blocks:
        raise InputError("b_scale.shape", tuple(b_scale.shape), f"[ceil(n/128), k/128] = {blocks}")
    if out_dtype not in OUT_DTYPES:
        raise InputError("out_dtype", out_dtype, " or ".join(map(str, OUT_DTYPES)))
    same_device("a_scale", a_scale, "a", a)
    same_device("b", b, "a", a)
    same_device("b_scale", b_scale, "a", a)
    return Sizes(m, n, k)


def outputs(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Allocate the result, uninitialised."""
    m, n, _ = sizes(a, a_scale, b, b_scale, out_dtype=out_dtype)
    return a.new_empty((m, n), dtype=out_dtype)


def make_inputs(
    *,
    m: int = 64,
    n: int = 7168,
    k: int = 2048,
    is_preshuffled: bool = False,
    scale_layout: str = "row",
    scale_format: str = "fp32",
    fp8: torch.dtype | None = None,
    row_pad: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Return one call's arguments; *dtype* is the result's, *scale_layout* and *_format* a_scale's.

    Signed numbers, and scales of 2**-6 to 2**6 in any order: neither a permuted scale nor a
    permuted weight can pass for the right one.
    """
    if is_preshuffled and n % 16:
        raise InputError("n", n, "a multiple of 16 for a preshuffled weight")
    from hwfuse._random import Random

    random = Random(seed, device)
    fp8 = fp8 or fp8_dtype(device)
    num_groups = k // BLOCK
    exponents = random.integers(-6, 7, m, num_groups, dtype=torch.int32)
    a_scale = layouts.empty(
        m, num_groups, scale_layout=scale_layout, scale_format=scale_format, device=device
    )
    if scale_format == "ue8m0_packed":
        packed = torch.zeros(m, 4 * a_scale.shape[1], dtype=torch.uint8, device=device)
        packed[:, :num_groups] = exponents + 127
        a_scale.copy_(packed.view(torch.int32))
    else:
        a_scale.copy_(exponents.exp2())
    if scale_format == "fp32":
        a_scale *= random.normal(m, num_groups).abs() + 0.5
    b_shape = (n // 16, k // 32, 2, 16, 16) if is_preshuffled else (n, k)
    b_blocks = ((n + BLOCK - 1) // BLOCK, num_groups)
    return {
        "a": random.rows(m, k, row_pad=row_pad, dtype=fp8),
        "a_scale": a_scale,
        "b": random.normal(*b_shape, dtype=fp8),
        "b_scale": random.integers(-6, 7, *b_blocks, dtype=torch.float32).exp2()
        * (random.normal(*b_blocks).abs() + 0.5),
        "out_dtype": dtype,
    }


# The order of float32 sums is free, and hardware may keep fewer bits between blocks; a single
# misplaced scale or block gives far more.  1e-3 is DeepGEMM's bound.
COMPARE: dict[str, tuple[str, dict[str, Any]]] = {"out": ("calc_diff", {"bound": 1e-3})}


def _rows_of_b(b: Tensor, k: int) -> int:
    """Return N, from the plain weight or the preshuffled one."""
    if b.ndim != 5:
        check("b", b, 2, FP8_DTYPES)
        if b.shape[1] != k:
            raise InputError("b.shape", tuple(b.shape), f"[n, k = {k}], as a")
        return b.shape[0]
    if b.shape[1:] != (k // 32, 2, 16, 16):
        raise InputError("b.shape", tuple(b.shape), f"[n/16, {k // 32}, 2, 16, 16] for k = {k}")
    if not b.is_contiguous():
        raise InputError("b.stride()", b.stride(), "a contiguous preshuffled weight")
    return b.shape[0] * 16


def _check_a_scale(a_scale: Tensor, m: int, num_groups: int) -> None:
    if a_scale.ndim != 2:
        raise InputError("a_scale.shape", tuple(a_scale.shape), "2 dimensions")
    if a_scale.shape[0] != m:
        raise InputError("a_scale.shape[0]", a_scale.shape[0], f"{m}, the number of rows of a")
    if a_scale.dtype == torch.float32:
        width, meaning = num_groups, "k/128"
    elif a_scale.dtype == torch.int32:
        width, meaning = (num_groups + 3) // 4, "ceil(k/512), packed exponents"
    else:
        raise InputError("a_scale.dtype", a_scale.dtype, "torch.float32 or torch.int32")
    if a_scale.shape[1] != width:
        raise InputError("a_scale.shape[1]", a_scale.shape[1], f"{width} = {meaning}")

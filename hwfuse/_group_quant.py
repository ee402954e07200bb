"""What the specs of the fp8_group_quant family share: sizes, checks, results and inputs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hwfuse import layouts
from hwfuse._checks import check
from hwfuse._device import fp8_dtype
from hwfuse._errors import InputError
from hwfuse._random import Random

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)


class Sizes(NamedTuple):
    """Rows, elements of a quantised row, groups of it."""

    m: int
    k: int
    num_groups: int


def check_options(
    group_size: int, scale_layout: str, scale_format: str, dtype: torch.dtype | None
) -> None:
    """Raise `InputError` for an option that does not exist or does not go with the others."""
    layouts.check(scale_layout, scale_format)
    if dtype is not None and dtype not in FP8_DTYPES:
        raise InputError("dtype", dtype, " or ".join(map(str, FP8_DTYPES)))
    if group_size < 1:
        raise InputError("group_size", group_size, "a positive number")


def check_rows(
    x: Tensor, group_size: int, scale_layout: str, scale_format: str, dtype: torch.dtype | None
) -> Sizes:
    """Check an x of which each row is quantised as it is, and the options; return the sizes."""
    check("x", x, 2, DTYPES)
    check_options(group_size, scale_layout, scale_format, dtype)
    m, k = x.shape
    num_groups = k // group_size
    if k % group_size or not num_groups:
        raise InputError("x.shape[1]", k, f"a positive multiple of group_size = {group_size}")
    return Sizes(m, k, num_groups)


def empty(
    x: Tensor,
    m: int,
    k: int,
    group_size: int,
    scale_layout: str,
    scale_format: str,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Allocate q ``[M, K]`` and its scale on x's device, uninitialised."""
    q = x.new_empty((m, k), dtype=dtype or fp8_dtype(x.device))
    scale = layouts.empty(
        m, k // group_size, scale_layout=scale_layout, scale_format=scale_format, device=x.device
    )
    return q, scale


def make_rows(
    random: Random, m: int, k: int, *, group_size: int, row_pad: int, dtype: torch.dtype
) -> Tensor:
    """Return ``[M, K]`` in which a scale in another group's place shows.

    Magnitudes differ from group to group.  From the second row on, every sixteenth row has in its
    first group: zeros, a NaN, an infinity, an outlier, numbers below the floor of the scale, or
    a largest number whose scale is exactly a power of two, in e4m3fn or in e4m3fnuz.
    """
    x = random.rows(m, k, row_pad=row_pad, dtype=dtype)
    exponents = random.integers(-6, 7, m, k // group_size, dtype=torch.float32)
    x *= exponents.exp2().repeat_interleave(group_size, dim=1).to(dtype)
    x[1::16, :group_size] = 0.0
    x[2::16, group_size // 2 :][:, :1] = float("nan")
    x[3::16, group_size // 3 :][:, :1] = -float("inf")
    x[4::16, group_size - 1 :][:, :1] = 3e4
    x[5::16, :group_size] *= 2.0**-45
    for row, qmax in ((6, 448.0), (7, 240.0)):
        x[row::16, :group_size].clamp_(-1.0, 1.0)
        x[row::16, :1] = qmax / 8
    return x

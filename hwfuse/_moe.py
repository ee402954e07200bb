"""What the specs of the w4a8 mixture of experts share: checks, and inputs with invalid routes."""

from __future__ import annotations

import torch
from torch import Tensor

from hwfuse._checks import check, same_device
from hwfuse._errors import InputError
from hwfuse._random import Random

FP8 = torch.float8_e4m3fn
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def check_scale(name: str, scale: Tensor, other_name: str, other: Tensor) -> None:
    """Check a scale that is one float32 on the device of another argument."""
    check(name, scale, 1, (torch.float32,))
    if scale.shape[0] != 1:
        raise InputError(f"{name}.shape", tuple(scale.shape), "(1,)")
    same_device(name, scale, other_name, other)


def check_routes(name: str, routes: Tensor, other_name: str, other: Tensor) -> int:
    """Check ``[M, topk]`` int32 beside another argument; return topk."""
    check(name, routes, 2, (torch.int32,))
    if not routes.shape[1]:
        raise InputError(f"{name}.shape[1]", routes.shape[1], "at least 1")
    same_device(name, routes, other_name, other)
    return routes.shape[1]


def check_offsets(expert_offsets: Tensor, other_name: str, other: Tensor) -> int:
    """Check ``expert_offsets [E + 1]`` beside another argument; return E."""
    check("expert_offsets", expert_offsets, 1, (torch.int32,))
    num_experts = expert_offsets.shape[0] - 1
    if num_experts < 1:
        raise InputError("expert_offsets.shape[0]", num_experts + 1, "experts + 1, at least 2")
    same_device("expert_offsets", expert_offsets, other_name, other)
    return num_experts


def make_offsets(random: Random, m: int, num_experts: int) -> Tensor:
    """Return ``[E + 1]`` int32 that leave some of M rows over, and experts from empty to hot.

    Of each four rows the second belongs to the last expert and the third to none.
    """
    expert = random.integers(0, num_experts, m, dtype=torch.int32)
    expert[1::4] = num_experts - 1
    expert[2::4] = num_experts
    bounds = torch.arange(num_experts + 1, dtype=torch.int32, device=random.device)
    return torch.searchsorted(expert.sort()[0], bounds).int()


def make_route_to_row(random: Random, m: int, topk: int) -> Tensor:
    """Return ``[M, topk]`` int32: rows in any order, -1 for routes of other ranks.

    Of each four tokens the third has no valid route and the fourth some.
    """
    last = (1 << 31) - 1
    order = random.integers(0, last, m, topk, dtype=torch.int32)
    is_invalid = random.integers(0, 2, m, topk, dtype=torch.int32) == 0
    is_invalid[0::4] = False
    is_invalid[1::4] = False
    is_invalid[2::4] = True
    order = order.masked_fill(is_invalid, last)
    rows = order.flatten().argsort(stable=True).argsort().view(m, topk)
    return rows.masked_fill(is_invalid, -1).int()


def make_rows(
    random: Random, m: int, width: int, used: Tensor, *, row_pad: int, dtype: torch.dtype
) -> Tensor:
    """Return ``[M, width]`` of which the rows past the last one in use are NaN.

    *used*: ``expert_offsets``, or the ``route_to_row`` that points to the rows.
    """
    rows = random.rows(m, width, row_pad=row_pad, dtype=dtype)
    if not rows.is_meta:
        rows[int(used[-1] if used.ndim == 1 else (used >= 0).sum()) :] = float("nan")
    return rows

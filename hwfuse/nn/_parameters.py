"""What the layers share: how their parameters are made."""

from __future__ import annotations

import torch
from torch import nn

from hwfuse._errors import InputError

BLOCK = 128


def check_multiple(name: str, size: int) -> None:
    """Raise `InputError` unless *size* is made of whole blocks."""
    if size < 1 or size % BLOCK:
        raise InputError(name, size, f"a positive multiple of {BLOCK}")


def fp8_block_weight(
    *shape: int, device: torch.device | str | None
) -> tuple[nn.Parameter, nn.Parameter]:
    """Return the weight ``[…, N, K]`` and its scales ``[…, ceil(N/128), K/128]``."""
    *leading, n, k = shape
    weight = frozen(*shape, dtype=torch.float8_e4m3fn, device=device)
    num_blocks = (n + BLOCK - 1) // BLOCK
    return weight, frozen(*leading, num_blocks, k // BLOCK, dtype=torch.float32, device=device)


def frozen(
    *shape: int, dtype: torch.dtype | None, device: torch.device | str | None
) -> nn.Parameter:
    """Return an uninitialised parameter that takes no gradient."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)

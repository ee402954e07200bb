"""Reference of moe_permute_fp8_quant."""

from __future__ import annotations

import torch
from torch import Tensor

from hwfuse.ops import moe_permute_fp8_quant as spec

REQUIRES = {"deterministic": True}


def moe_permute_fp8_quant(
    x: Tensor,
    route_to_row: Tensor,
    scale: Tensor,
) -> Tensor:
    rows = spec.outputs(x, route_to_row, scale)
    token, slot = (route_to_row >= 0).nonzero(as_tuple=True)
    token_of_row = torch.empty_like(token)
    token_of_row[route_to_row[token, slot]] = token
    rows[: len(token)] = quantise(x.float(), scale)[token_of_row]
    rows[len(token) :] = torch.nan  # unspecified; shows when a consumer reads it
    return rows


def quantise(x: Tensor, scale: Tensor) -> Tensor:
    """Return float32 numbers as float8_e4m3fn codes of one scale."""
    qmax = torch.finfo(torch.float8_e4m3fn).max
    return (x * (1 / scale)).clamp(-qmax, qmax).to(torch.float8_e4m3fn)

"""int4 weights of W4A8 experts: two to a byte, and the order of their group scales."""

from __future__ import annotations

import torch
from torch import Tensor

from hwfuse._errors import InputError


def pack_int4(weight: Tensor) -> Tensor:
    """Put two neighbours of the last dimension into one byte, the even one into the low nibble.

    Args:
        weight: ``[..., K]`` int8, whole numbers from -8 to 7, K even.

    Returns:
        ``[..., K/2]`` int8, ``byte[i] = weight[2*i+1] << 4 | weight[2*i] & 15``, in new memory.

    Raises:
        InputError: another dtype, an odd K, or a number outside of -8 to 7 (not checked without
            data, on meta).

    Source: the W4AFP8 checkpoints of DeepSeek-V3 and R1.
    """
    _check_int8("weight", weight)
    if weight.shape[-1] % 2:
        raise InputError("weight.shape[-1]", weight.shape[-1], "an even number: two to a byte")
    if not weight.is_meta and ((weight < -8) | (weight > 7)).any():
        found = f"numbers from {int(weight.min())} to {int(weight.max())}"
        raise InputError("weight", found, "-8 to 7, which four bits hold")
    return (weight[..., 1::2] << 4) | (weight[..., ::2] & 15)


def unpack_int4(packed: Tensor) -> Tensor:
    """Undo `pack_int4`: ``[..., K/2]`` bytes to ``[..., K]`` int8 from -8 to 7, in new memory."""
    _check_int8("packed", packed)
    # A right shift of a signed number copies its sign.
    return torch.stack([(packed << 4) >> 4, packed >> 4], dim=-1).flatten(-2)


def interleave_scales(scale: Tensor) -> Tensor:
    """Lay group scales out as the W4A8 GEMM loads them, as bfloat16.

    Args:
        scale: ``[..., N, G]`` float32 or bfloat16: N rows of a weight, G groups of 128 of its
            columns; factors, which may be negative.

    Returns:
        ``[..., G/i, N*i]`` bfloat16, in new contiguous memory: ``out[g // i, n*i + g % i]`` is
        ``scale[n, g]``, where i is 4 if G is a multiple of 4 (one 8-byte load serves 512
        columns), otherwise 1.

    Raises:
        InputError: another dtype or fewer than two dimensions.

    Source: SGLang's ``interleave_scales`` of W4AFP8 experts.
    """
    _check_scale(scale, (torch.float32, torch.bfloat16))
    num_groups = scale.shape[-1]
    i = 1 if num_groups % 4 else 4
    groups: Tensor = scale.to(torch.bfloat16).unflatten(-1, (num_groups // i, i))
    return groups.transpose(-3, -2).clone(memory_format=torch.contiguous_format).flatten(-2)


def deinterleave_scales(scale: Tensor, *, num_rows: int) -> Tensor:
    """Undo `interleave_scales`.

    Args:
        scale: ``[..., G/i, N*i]`` bfloat16.
        num_rows: N, rows of the weight; i follows.

    Returns:
        ``[..., N, G]`` bfloat16, in new contiguous memory.

    Raises:
        InputError: the last dimension is neither N nor 4*N long.
    """
    _check_scale(scale, (torch.bfloat16,))
    if num_rows < 1 or scale.shape[-1] not in (num_rows, 4 * num_rows):
        needed = f"{num_rows} or {4 * num_rows}: one or four groups of each of num_rows rows"
        raise InputError("scale.shape[-1]", scale.shape[-1], needed)
    groups: Tensor = scale.unflatten(-1, (num_rows, scale.shape[-1] // num_rows))
    return groups.transpose(-3, -2).clone(memory_format=torch.contiguous_format).flatten(-2)


def _check_int8(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.int8:
        raise InputError(f"{name}.dtype", tensor.dtype, "torch.int8")
    if tensor.ndim == 0:
        raise InputError(f"{name}.shape", (), "at least one dimension")


def _check_scale(scale: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if scale.dtype not in dtypes:
        raise InputError("scale.dtype", scale.dtype, " or ".join(map(str, dtypes)))
    if scale.ndim < 2:
        raise InputError("scale.shape", tuple(scale.shape), "at least two dimensions")

"""The 16x16 preshuffled layout of one-byte GEMM weights, which AMD's kernels read.

Element (n, k) lies at ``n//16 * 16*K + k//16 * 256 + n%16 * 16 + k%16``.  The rank of the result
says that it is preshuffled: a plain weight cannot be taken for it, nor the other way round.
"""

from __future__ import annotations

from torch import Tensor

from hwfuse._errors import InputError


def preshuffle_16x16(weight: Tensor) -> Tensor:
    """Return ``[N, K]`` as the contiguous ``[N/16, K/32, 2, 16, 16]``, in new memory.

    Args:
        weight: one-byte elements (fp8, int8); N a multiple of 16, K of 32.  Any strides.
            Its scales are not shuffled.
    """
    if weight.ndim != 2:
        raise InputError("weight.shape", tuple(weight.shape), "[N, K], two dimensions")
    _check_element(weight)
    n, k = weight.shape
    if n % 16:
        raise InputError("weight.shape[0]", n, "a multiple of 16")
    if k % 32:
        raise InputError("weight.shape[1]", k, "a multiple of 32")
    tiles = weight.reshape(n // 16, 16, k // 32, 2, 16)
    return tiles.permute(0, 2, 3, 1, 4).contiguous()


def unpreshuffle_16x16(weight: Tensor) -> Tensor:
    """Return ``[N/16, K/32, 2, 16, 16]`` as the plain contiguous ``[N, K]``, in new memory."""
    if weight.ndim != 5 or weight.shape[2:] != (2, 16, 16):
        raise InputError("weight.shape", tuple(weight.shape), "[N/16, K/32, 2, 16, 16]")
    _check_element(weight)
    rows, columns = weight.shape[:2]
    return weight.permute(0, 3, 1, 2, 4).reshape(rows * 16, columns * 32)


def _check_element(weight: Tensor) -> None:
    if weight.element_size() != 1:
        raise InputError("weight.dtype", weight.dtype, "a type of one byte")

"""FP8 weights: what one entry of a scale covers, and the two flavours of e4m3.

e4m3fn (NVIDIA, gfx950) and e4m3fnuz (gfx942) give the same byte different values: in fnuz each
means half as much, because its exponent has a bias of one more, and 0x80, which is -0 in fn, is the
only NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hwfuse._errors import InputError

BLOCK = 128  # rows and columns of a weight that one entry of a block scale covers
_NAN_FNUZ = 0x80
_NAN_FN = 0x7F  # with either sign


def rows_per_scale(scale: Tensor, num_rows: int, *, name: str = "scale") -> int | None:
    """Tell by its shape how many rows of a weight one row of its scale covers.

    Args:
        scale: ``[]`` or ``[1]``: one number for the weight.  ``[N]`` or ``[N, ...]``: one row for
            each row.  ``[ceil(N/128), ...]``, two dimensions: one row for 128 rows, the last block
            may be short.
        num_rows: N, rows of the weight.
        name: What an error calls the scale.

    Returns:
        None, 1 or 128, in this order.

    Raises:
        InputError: any other shape.
    """
    if scale.ndim < 2 and scale.numel() == 1:
        return None
    if scale.shape[0] == num_rows:
        return 1
    num_blocks = (num_rows + BLOCK - 1) // BLOCK
    if scale.ndim == 2 and scale.shape[0] == num_blocks:
        return BLOCK
    needed = f"[] or [1], [{num_rows}, ...] for rows, or [{num_blocks}, ...] for blocks of {BLOCK}"
    raise InputError(f"{name}.shape", tuple(scale.shape), needed)


def fn_to_fnuz(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Turn an e4m3fn weight and its scale into the e4m3fnuz pair with the same products.

    Bytes stay, but for -0, which becomes 0, and NaN, which stays NaN under fnuz's code; the scale
    doubles.  A scale of activations that are quantised to fnuz doubles, too, by the caller.

    Args:
        weight: float8_e4m3fn, any shape.
        scale: bfloat16, float16 or float32, any shape; the factor from codes to numbers.

    Returns:
        The weight as float8_e4m3fnuz and the scale, in new memory.

    Raises:
        InputError: another dtype.

    Source: vLLM's and SGLang's ``normalize_e4m3fn_to_e4m3fnuz``, which lets NaN become a number.
    """
    _check_dtypes(weight, torch.float8_e4m3fn, scale)
    codes = weight.view(torch.uint8)
    is_nan = (codes & 0x7F) == _NAN_FN
    codes = codes.masked_fill(codes == 0x80, 0).masked_fill(is_nan, _NAN_FNUZ)
    return codes.view(torch.float8_e4m3fnuz), scale * 2


def fnuz_to_fn(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Undo `fn_to_fnuz`; a -0 that it met comes back as 0.

    Args:
        weight: float8_e4m3fnuz, any shape.
        scale: bfloat16, float16 or float32, any shape.

    Returns:
        The weight as float8_e4m3fn and half the scale, in new memory.

    Raises:
        InputError: another dtype, or an element of 240 or -240, which e4m3fn cannot express at half
            the scale (not checked without data, on meta).
    """
    _check_dtypes(weight, torch.float8_e4m3fnuz, scale)
    codes = weight.view(torch.uint8)
    largest = (codes & 0x7F) == 0x7F
    if not weight.is_meta and largest.any():
        needed = "at most 224, which is e4m3fn's 448 at half the scale"
        raise InputError("weight", f"{int(largest.sum())} elements of size 240", needed)
    return codes.masked_fill(codes == _NAN_FNUZ, _NAN_FN).view(torch.float8_e4m3fn), scale / 2


def _check_dtypes(weight: Tensor, dtype: torch.dtype, scale: Tensor) -> None:
    if weight.dtype != dtype:
        raise InputError("weight.dtype", weight.dtype, str(dtype))
    if scale.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        needed = "torch.bfloat16, torch.float16 or torch.float32"
        raise InputError("scale.dtype", scale.dtype, needed)

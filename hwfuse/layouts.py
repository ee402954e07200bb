"""How the scales of fp8 groups lie in memory.

Shape and strides of a scale tensor always tell the truth, so it may be viewed, sliced and indexed
like any tensor.  For M rows and G groups:

============  ================  ==========================================================
layout        strides           storage
============  ================  ==========================================================
row           (G, 1)            M * G elements
column        (1, M)            G * M elements
column_tma    (1, align(M, 4))  G * align(M, 4) elements: TMA descriptors cover the padding
============  ================  ==========================================================

============  =======  ============  ===============================================
format        dtype    shape         content
============  =======  ============  ===============================================
fp32          float32  [M, G]        any scale
ue8m0         float32  [M, G]        powers of two
ue8m0_packed  int32    [M, ceil(G/4)]  exponents, group 4i+b in byte b; column_tma only
============  =======  ============  ===============================================

The bytes of a packed scale past group G are 0.  Rows of padding (M to align(M, 4)) hold anything.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hwfuse._errors import InputError

LAYOUTS = ("row", "column", "column_tma")
FORMATS = ("fp32", "ue8m0", "ue8m0_packed")


def check(scale_layout: str, scale_format: str) -> None:
    """Raise `InputError` unless such a scale exists."""
    if scale_layout not in LAYOUTS:
        raise InputError("scale_layout", repr(scale_layout), " or ".join(map(repr, LAYOUTS)))
    if scale_format not in FORMATS:
        raise InputError("scale_format", repr(scale_format), " or ".join(map(repr, FORMATS)))
    if scale_format == "ue8m0_packed" and scale_layout != "column_tma":
        raise InputError("scale_layout", repr(scale_layout), "'column_tma' for 'ue8m0_packed'")


def empty(
    num_rows: int,
    num_groups: int,
    *,
    scale_layout: str = "row",
    scale_format: str = "fp32",
    device: torch.device | str | None = None,
) -> Tensor:
    """Return an uninitialised scale of one layout and format."""
    check(scale_layout, scale_format)
    if scale_format == "ue8m0_packed":
        return _empty(num_rows, (num_groups + 3) // 4, scale_layout, torch.int32, device)
    return _empty(num_rows, num_groups, scale_layout, torch.float32, device)


def matches(scale: Tensor, scale_layout: str) -> bool:
    """Tell whether *scale* ``[M, G]`` lies in a layout, exactly; every layout holds at M = 0.

    The stride of a dimension of size 1 is never used to address an element and does not count,
    except the second one of column_tma, which is the pitch that a TMA descriptor is made of.
    """
    num_rows, num_groups = _shape(scale)
    row_stride, group_stride = _strides(num_rows, num_groups, scale_layout)
    if num_rows == 0:
        return True
    is_tma = scale_layout == "column_tma"
    return (
        (num_rows == 1 or scale.stride(0) == row_stride)
        and ((num_groups == 1 and not is_tma) or scale.stride(1) == group_stride)
        and (not is_tma or _owns(scale, num_groups * group_stride))
    )


def convert(scale: Tensor, scale_layout: str) -> Tensor:
    """Return *scale* in a layout: itself if it `matches`, otherwise a copy with equal elements."""
    if scale.dtype not in (torch.float32, torch.int32):
        raise InputError("scale.dtype", scale.dtype, "torch.float32 or torch.int32")
    check(scale_layout, "ue8m0_packed" if scale.dtype == torch.int32 else "fp32")
    if matches(scale, scale_layout):
        return scale
    num_rows, width = _shape(scale)
    return _empty(num_rows, width, scale_layout, scale.dtype, scale.device).copy_(scale)


def from_aiter_legacy(scale: Tensor) -> Tensor:
    """Return the honest column view of aiter's transposed scale; no copy.

    Such a tensor says ``[M, G]`` contiguous while its bytes are those of the ``[G, M]`` matrix.
    """
    num_rows, num_groups = _shape(scale)
    if not scale.is_contiguous():
        raise InputError("scale.stride()", scale.stride(), f"({num_groups}, 1): aiter's bytes")
    return scale.view(num_groups, num_rows).t()


def to_aiter_legacy(scale: Tensor) -> Tensor:
    """Return aiter's reading of a scale in layout column: the same bytes, called ``[M, G]``.

    The result lies about its strides: hand it to aiter and to nothing else.
    """
    num_rows, num_groups = _shape(scale)
    if not matches(scale, "column"):
        needed = f"(1, {num_rows}): convert(scale, 'column') first"
        raise InputError("scale.stride()", scale.stride(), needed)
    return scale.t().view(num_rows, num_groups)


def _shape(scale: Tensor) -> tuple[int, int]:
    if scale.ndim != 2:
        raise InputError("scale.shape", tuple(scale.shape), "[M, G], two dimensions")
    return scale.shape[0], scale.shape[1]


def _strides(num_rows: int, width: int, scale_layout: str) -> tuple[int, int]:
    if scale_layout == "row":
        return width, 1
    if scale_layout == "column":
        return 1, num_rows
    if scale_layout == "column_tma":
        return 1, (num_rows + 3) // 4 * 4
    raise InputError("scale_layout", repr(scale_layout), " or ".join(map(repr, LAYOUTS)))


def _owns(scale: Tensor, num_elements: int) -> bool:
    end = scale.storage_offset() + num_elements
    return scale.untyped_storage().nbytes() >= end * scale.element_size()


def _empty(
    num_rows: int,
    width: int,
    scale_layout: str,
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> Tensor:
    strides = _strides(num_rows, width, scale_layout)
    if scale_layout != "column_tma":
        return torch.empty_strided((num_rows, width), strides, dtype=dtype, device=device)
    padded = torch.empty(width * strides[1], dtype=dtype, device=device)
    return padded.as_strided((num_rows, width), strides)

"""The two checks that every op's `sizes` makes on its tensors; they run on every call."""

from __future__ import annotations

from torch import Tensor, dtype, strided

from hwfuse._errors import InputError


def check(name: str, tensor: Tensor, ndim: int, dtypes: tuple[dtype, ...]) -> None:
    """Raise `InputError` unless *tensor* has *ndim* dimensions, a known dtype, unit last stride."""
    if tensor.ndim != ndim:
        raise InputError(f"{name}.shape", tuple(tensor.shape), f"{ndim} dimensions")
    if tensor.dtype not in dtypes:
        raise InputError(f"{name}.dtype", tensor.dtype, " or ".join(map(str, dtypes)))
    try:
        stride = tensor.stride()[-1]  # half the time of stride(-1)
    except RuntimeError:  # compressed sparse tensors have none, other layouts say 0
        stride = 0
    if stride != 1 and tensor.shape[-1] != 1:
        if tensor.layout != strided:
            raise InputError(f"{name}.layout", tensor.layout, "a dense tensor")
        found = f"{stride} (shape {tuple(tensor.shape)}, strides {tensor.stride()})"
        raise InputError(f"{name}.stride(-1)", found, "1: elements of a row side by side")


def same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise `InputError` unless both tensors lie on one device."""
    if tensor.device != other.device:
        raise InputError(f"{name}.device", tensor.device, f"{other.device}, as {other_name}")

"""What only matters on torch's device type cuda, which is NVIDIA's and AMD's.

Not loaded on other devices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from hwfuse._errors import ColdCallInCapture


@functools.cache
def vendor_and_arch(index: int) -> tuple[str, str]:
    """Return (``nvidia``, ``sm90``) or (``amd``, ``gfx942``) of a device of torch's type cuda."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return "amd", properties.gcnArchName.split(":")[0]
    return "nvidia", f"sm{properties.major}{properties.minor}"


def on(device: torch.device, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return *function*, wrapped to launch on *device* if another one is current."""
    if device.index == torch.cuda.current_device():
        return function

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.cuda.device(device):
            return function(*args, **kwargs)

    return call


def refuse_capture(name: str) -> None:
    """Raise inside a CUDA graph capture: choosing and compiling cannot happen there."""
    if torch.cuda.is_current_stream_capturing():
        raise ColdCallInCapture(
            f"first call of {name} of its kind inside a CUDA graph capture; choosing and compiling "
            f"cannot happen there: call it once before, or hwfuse.warmup({name!r}, …)"
        )

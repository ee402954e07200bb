"""Every name without an underscore-free twin that launching uses, looked up once, here only.

A name that is gone selects a slower public form or the ordinary launch, never an error; a test
asserts that the installed releases have them all, so that a rename shows as a red test.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


def _torch(path: str, default: Any = None) -> Any:
    found: Any = torch
    for name in path.split("."):
        found = getattr(found, name, None)
    return default if found is None else found


# Names of torch builds for CUDA and ROCm only; a build for the CPU lacks the last two.
empty_strided_cuda: Callable[..., torch.Tensor] | None = _torch(
    "_C._dynamo.guards._empty_strided_cuda"
)
tensor_guards: Any = _torch("_C._dynamo.guards.TensorGuards")  # Dynamo's own check of inputs
mode_depth: Callable[[], int] | None = _torch("_C._len_torch_dispatch_stack")
exchange_api: Any = _torch("Tensor.__dlpack_c_exchange_api__")
current_device: Callable[[], int] = _torch("_C._cuda_getDevice", torch.cuda.current_device)
raw_stream: Callable[[int], int] | None = _torch("_C._cuda_getCurrentRawStream")


@dataclass(frozen=True)
class Hooks:
    """Where Triton keeps the functions that profilers want called at every launch.

    They are active unless both are the empty chains that Triton was loaded with: a user may add to
    a chain, or put a function in its place.
    """

    knobs: Any
    enter: Any
    exit: Any


@functools.cache
def hooks() -> Hooks | None:
    """Return Triton's launch hooks; None if this release keeps them elsewhere."""
    from triton import knobs

    runtime = getattr(knobs, "runtime", None)
    enter = getattr(type(runtime), "launch_enter_hook", None)
    leave = getattr(type(runtime), "launch_exit_hook", None)
    if not all(isinstance(getattr(chain, "calls", None), list) for chain in (enter, leave)):
        return None
    return Hooks(runtime, enter, leave)


def missing() -> list[str]:
    """Return the private names that this torch and this Triton lack."""
    found = {
        "torch._C._dynamo.guards._empty_strided_cuda": empty_strided_cuda,
        "torch._C._dynamo.guards.TensorGuards": tensor_guards,
        "torch._C._len_torch_dispatch_stack": mode_depth,
        "torch.Tensor.__dlpack_c_exchange_api__": exchange_api,
        "torch._C._cuda_getDevice": _torch("_C._cuda_getDevice"),
        "torch._C._cuda_getCurrentRawStream": raw_stream,
        "triton.knobs.runtime.launch_enter_hook.calls": hooks(),
    }
    return [name for name, value in found.items() if value is None]

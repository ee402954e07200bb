"""Recording a call: which tensors it allocates, which kernels it launches, what it returns.

A wrapper of a kernel decides by dtypes, shapes, strides and options only.  For a second call with
the same ones, all that it does can therefore be repeated from a record of the first: the checks of
`sizes` had the same answer, the results have the same format, the kernels get the same numbers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_ALLOCATIONS = ("aten.empty.memory_format", "aten.empty_strided.default")
BUSY = "another thread is recording"
NOTHING = "it launches nothing"
_lock = threading.Lock()


@dataclass(frozen=True)
class Kernel:
    """A binary as the driver launches it.

    *kinds*: one letter per argument, as `struct` has them: P, i, I, q, f.  *scratch*: how many
    unused pointers follow.  *keep*: what has to live as long as the binary is used.
    """

    function: int
    block: int
    shared: int
    kinds: str
    pdl: bool = False
    cluster: int = 1
    scratch: int = 0
    keep: Any = None


@dataclass(frozen=True)
class Recipe:
    """What one call did.  Tensors are numbers: first the arguments, then what was allocated."""

    allocations: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]
    launches: tuple[tuple[Kernel, tuple[int, int, int], tuple[Any, ...]], ...]
    result: int | tuple[int, ...] | None


class Recording:
    """What is noted while a call runs; *strange* says why it cannot be repeated."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.tensors: list[tuple[Tensor, Any]] = []
        self.launches: list[tuple[Kernel, tuple[int, int, int], tuple[Any, ...]]] = []
        self.strange: list[str] = []

    def launched(
        self, kernel: Kernel | str, grid: tuple[int, int, int], values: tuple[Any, ...]
    ) -> None:
        """Note a launch; a string says why it cannot be repeated."""
        if isinstance(kernel, str):
            self.strange.append(kernel)
        else:
            self.launches.append((kernel, grid, values))


active: Recording | None = None


def mine() -> Recording | None:
    """Return the recording of this thread, if one is going on."""
    found = active
    return found if found is not None and found.thread == threading.get_ident() else None


class _Watch(TorchDispatchMode):
    """Sees every other thing that torch is asked to do."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if str(func) not in _ALLOCATIONS:
            self.recording.strange.append(f"it calls {func}")
        return func(*args, **(kwargs or {}))


def record(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, Recipe | str]:
    """Call *function*; return its result and a recipe, or why there is none."""
    global active  # noqa: PLW0603
    if not _lock.acquire(blocking=False):
        return function(*args, **kwargs), BUSY
    try:
        active = recording = Recording()
        with _Watch(recording):
            result = function(*args, **kwargs)
    finally:
        active = None
        _lock.release()
    values = [*args, *kwargs.values()]
    return result, _recipe(recording, values, result)


def _at(address: Any, tensors: list[Any]) -> int | None:
    """Return which tensor begins at an address; None if none or several do."""
    found = [i for i, t in enumerate(tensors) if isinstance(t, Tensor) and t.data_ptr() == address]
    return found[0] if len(found) == 1 else None


def _recipe(recording: Recording, values: list[Any], result: Any) -> Recipe | str:
    if recording.strange:
        return recording.strange[0]
    if not recording.launches:
        return NOTHING
    number = {id(value): i for i, value in enumerate(values) if isinstance(value, Tensor)}
    number |= {id(t): len(values) + i for i, (t, _) in enumerate(recording.tensors)}
    every = [*values, *(t for t, _ in recording.tensors)]
    launches = []
    for kernel, grid, arguments in recording.launches:
        known = []
        for kind, a in zip(kernel.kinds, arguments, strict=True):
            place = number.get(id(a)) if isinstance(a, Tensor) else _at(a, every)
            if kind == "P" and place is None:
                return "a kernel gets a tensor that is neither an argument nor new"
            known.append(place if kind == "P" else a)
        launches.append((kernel, grid, tuple(known)))
    found: Any = None
    if isinstance(result, Tensor):
        found = number.get(id(result))
    elif type(result) is tuple:
        found = tuple(number.get(id(one)) for one in result)
    if result is not None and (found is None or (isinstance(found, tuple) and None in found)):
        return "it returns something that is neither an argument nor new"
    return Recipe(tuple(form for _, form in recording.tensors), tuple(launches), found)

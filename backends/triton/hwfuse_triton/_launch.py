"""Launching Triton kernels, and the memory that they write.

An op's file makes a `Launch` per combination of constants, keeps it (`functools.cache`) and calls
it with the number of programs and the kernel's other arguments.

The first launch is ``kernel[grid](...)``, and so is every one that is unusual in any way; the
others go by a plan (_plan.py).  HWFUSE_LAUNCH=triton leaves plans out; HWFUSE_CHECK_LAUNCH=1 makes
every planned launch a second time as the ordinary one and compares all that they wrote.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hwfuse import HwfuseError, HwfuseWarning
from hwfuse_triton import _plan, _private, _record

TIERS = ("triton", "python", "native")  # what HWFUSE_LAUNCH may say; each has what is before it


def tier() -> str:
    """Return the fastest way of launching that HWFUSE_LAUNCH allows."""
    found = os.environ.get("HWFUSE_LAUNCH", "native")
    if found not in TIERS:
        raise HwfuseError(f"HWFUSE_LAUNCH is {found!r}, needs one of {', '.join(TIERS)}")
    return found


class Launch:
    """A kernel with its constants and options.

    Args:
        kernel: A ``@triton.jit`` function.  Its integer arguments are in ``do_not_specialize``,
            fit 32 bits, and nothing is assumed of them; its tensors begin at multiples of 16
            bytes, or the launch is an ordinary one.
        num_warps: Warps per program, of 32 threads on NVIDIA, 64 on AMD.
        pdl: Programmatic dependent launch: the kernel may start before the one before it has
            ended, and waits itself.  The kernel has a constant ``PDL`` that says so.
        options: Other options of Triton: ``num_stages``, ``maxnreg``, ``waves_per_eu``.
        constants: The kernel's ``tl.constexpr`` arguments.
    """

    def __init__(
        self,
        kernel: Any,
        *,
        num_warps: int,
        pdl: bool | None = None,
        options: dict[str, Any] | None = None,
        **constants: Any,
    ) -> None:
        self.kernel = kernel
        self.keywords = {**constants, **(options or {}), "num_warps": num_warps}
        if pdl is not None:
            self.keywords["PDL"] = pdl
        if pdl:
            self.keywords["launch_pdl"] = True
        self.forget()
        _all.add(self)

    def __call__(self, programs: int, *arguments: Tensor | float) -> None:
        """Run *programs* programs; *arguments*: the kernel's, up to its first constant."""
        plan = self._plan
        if not plan.launch(programs, arguments):
            plan = self._other(programs, arguments)
        if _record.active is not None and (recording := _record.mine()):
            recording.launched(self._binary(plan), (programs, 1, 1), arguments)

    def forget(self) -> None:
        """Drop what was learned of this process's GPU."""
        self._plan: _plan.Plan = _NONE
        self.plans: dict[tuple[Any, ...], _plan.Plan] = {}
        self.refusals: dict[tuple[Any, ...], str] = {}

    def ordinary(self, programs: int, arguments: tuple[Any, ...]) -> Any:
        """Launch as Triton does; return the compiled kernel."""
        return self.kernel[(programs,)](*arguments, **self.keywords)

    def _other(self, programs: int, arguments: tuple[Any, ...]) -> _plan.Plan:
        """Launch by another plan, the ordinary way, or the first time; return the plan used."""
        tensors = [a for a in arguments if isinstance(a, Tensor)]
        key = (*(t.dtype for t in tensors), tensors[0].get_device()) if tensors else ()
        plan = self.plans.get(key)
        if plan is not None and plan is not self._plan and plan.launch(programs, arguments):
            self._plan = plan
            return plan
        compiled = self.ordinary(programs, arguments)
        if plan is None and key not in self.refusals and _may_plan(programs, tensors):
            self._make_plan(key, compiled, arguments)
        return _NONE

    def _make_plan(self, key: tuple[Any, ...], compiled: Any, arguments: tuple[Any, ...]) -> None:
        made = _plan.make(self.kernel, compiled, arguments, key[-1])
        if isinstance(made, str):
            self.refusals[key] = made
            name = getattr(self.kernel, "__name__", self.kernel)
            text = f"{name} is launched by Triton, some 6 us slower: {made}"
            warnings.warn(text, HwfuseWarning, stacklevel=5)
            return
        if os.environ.get("HWFUSE_CHECK_LAUNCH") == "1":
            made = dataclasses.replace(made, launch=functools.partial(_check, self, made))
        self.plans[key] = self._plan = made

    def _binary(self, plan: _plan.Plan) -> _record.Kernel | str:
        """Return the binary of the launch just made by *plan*, or why it cannot be repeated."""
        if plan is not _NONE:
            return plan.binary()
        return next(iter(self.refusals.values()), NOT_PLANNED)


NOT_PLANNED = "a launch was not planned"
_NONE = _plan.Plan(None, "", (), (), -1, lambda _programs, _arguments: False)
_all: weakref.WeakSet[Launch] = weakref.WeakSet()


def _may_plan(programs: int, tensors: list[Tensor]) -> bool:
    """Say whether what Triton compiled for this call could be right for others."""
    return (
        programs > 0
        and bool(tensors)
        and all(t.is_cuda and t.data_ptr() and not t.data_ptr() % 16 for t in tensors)
        and tier() != "triton"
    )


def _check(launch: Launch, plan: _plan.Plan, programs: int, arguments: tuple[Any, ...]) -> bool:
    """Launch by the plan and the ordinary way, on the same memory, and compare what came out."""
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    if _record.mine() or torch.cuda.is_current_stream_capturing():
        return plan.launch(programs, arguments)
    before = [t.clone() for t in tensors]
    if not plan.launch(programs, arguments):
        return False
    found = [t.clone() for t in tensors]
    for tensor, old in zip(tensors, before, strict=True):
        tensor.copy_(old)
    launch.ordinary(programs, arguments)
    for index, (one, other) in enumerate(zip(found, tensors, strict=True)):
        if not torch.equal(bits_of(one), bits_of(other)):
            raise HwfuseError(
                f"HWFUSE_CHECK_LAUNCH: tensor {index} of {launch.kernel.__name__} differs between "
                "a planned and an ordinary launch; please report it, with HWFUSE_LAUNCH=triton "
                "it does not happen"
            )
    return True


def bits_of(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor, in which NaN equals itself and -0.0 is not 0.0."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def forget_all() -> None:
    """Drop all plans: after a fork they are the parent's."""
    for launch in list(_all):
        launch.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget_all)


@functools.cache
def has_pdl(index: int) -> bool:
    """Say whether kernels on device *index* can start before the one they depend on has ended.

    The CPU's index is -1.
    """
    return (
        index >= 0
        and torch.version.hip is None
        and torch.cuda.get_device_capability(index) >= (9, 0)
    )


def empty(
    like: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    strides: tuple[int, ...] | None = None,
) -> Tensor:
    """Allocate an output on the device of *like*, contiguous unless *strides* says otherwise."""
    if type(shape) is not tuple:  # torch.Size is refused by the private allocation
        shape = tuple(shape)
    if strides is None:
        strides = _contiguous(shape)
    if (
        like.is_cuda
        and _allocate is not None
        and like.get_device() == _current_device()
        and not _mode_depth()
    ):
        return _allocate(shape, strides, dtype)
    tensor = torch.empty_strided(shape, strides, dtype=dtype, device=like.device)
    if _record.active is not None and (recording := _record.mine()):
        recording.tensors.append((tensor, (tuple(shape), tuple(strides), dtype)))
    return tensor


@contextlib.contextmanager
def filling(byte: int) -> Iterator[None]:
    """Fill what `empty` allocates, in all threads; for HWFUSE_CHECK_LAUNCH and tests."""
    global _allocate  # noqa: PLW0603
    allocate = _allocate

    def filled(shape: Any, strides: Any, dtype: torch.dtype) -> Tensor:
        tensor = torch.empty_strided(shape, strides, dtype=dtype, device="cuda")
        tensor.untyped_storage().fill_(byte)
        return tensor

    _allocate = filled
    try:
        yield
    finally:
        _allocate = allocate


# The private allocation is invisible to dispatch modes, so without a count of them it is not used.
_allocate = _private.empty_strided_cuda if _private.mode_depth else None
_mode_depth = _private.mode_depth or (lambda: 0)
_current_device = _private.current_device


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) == 2:
        return (shape[1] or 1, 1)
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size or 1
    return tuple(reversed(strides))

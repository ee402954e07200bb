"""`replayed`: an implementation whose repeated calls cost little of the host's time.

The first calls run the Python function, one of them is recorded (_record.py), and later ones with
the same dtypes, shapes, strides and options are replayed: in C (_native.c), else in Python
(_again.py).  Everything unusual runs the function.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hwfuse import HwfuseError
from hwfuse_triton import _again, _launch, _native, _private, _record

_all: list[Any] = []  # for the whole life of the process, as the functions are
refusals: dict[str, str] = {}  # op: why some of its calls are not replayed


def replayed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return *function* such that its repeated calls are replayed on a GPU.

    It has to allocate through `empty`, launch through `Launch`, and decide by dtypes, shapes,
    strides, options, the low 8 bits of addresses and whether two arguments are one tensor.
    """
    if not torch.cuda.is_available() or _launch.tier() == "triton":
        return function
    native = _launch.tier() == "native" and not torch.version.hip
    module = _native.load() if native else None
    if module is None and not (_private.mode_depth and _private.empty_strided_cuda):
        return function
    return wrapped(module, function)


def wrapped(module: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return *function* with replays: of the C *module*, or in Python if that is None."""

    def missed(*args: Any, **kwargs: Any) -> Any:
        if not replays.seen(*args, **kwargs) or not _usual():
            return function(*args, **kwargs)
        result, recipe = _record.record(function, args, kwargs)
        try:
            if isinstance(recipe, str):
                raise ValueError(recipe)  # noqa: TRY301, TRY004 - as `add` does
            add(replays, args, kwargs, recipe)
        except (ValueError, OverflowError) as error:
            if str(error) not in _TEMPORARY or next(failures) > _MOST_FAILURES:
                replays.refuse(*args, **kwargs)
                refusals[function.__name__] = str(error)
        return result

    failures = itertools.count(1)
    add = _add if module else _again.Replays.add
    replays: Any = module.Replays(missed) if module else _again.Replays(function, missed)
    call: Any = replays if module else replays.call
    functools.update_wrapper(call, function)
    call.replays = replays
    _all.append(replays)
    if os.environ.get("HWFUSE_CHECK_LAUNCH") == "1":
        call = functools.wraps(function)(functools.partial(_checked, call, function))
        call.replays = replays
    return call


# Reasons that may be gone at the next call of this kind; recording again and again is not free.
_TEMPORARY = (_record.BUSY, _record.NOTHING, _launch.NOT_PLANNED)
_MOST_FAILURES = 100


def _usual() -> bool:
    """Say whether this is a moment to record: nothing is watching, nothing is being captured."""
    hooks = _private.hooks()
    return (
        hooks is not None
        and hooks.knobs.launch_enter_hook is hooks.enter
        and hooks.knobs.launch_exit_hook is hooks.exit
        and not (hooks.enter.calls or hooks.exit.calls)
        and not (_private.mode_depth and _private.mode_depth())
        and not torch.cuda.is_current_stream_capturing()
    )


def _add(replays: Any, args: tuple[Any, ...], kwargs: dict[str, Any], recipe: Any) -> None:
    kernels = tuple(
        (k.function, grid, k.block, k.shared, k.pdl, k.cluster, k.kinds, k.scratch, values)
        for k, grid, values in recipe.launches
    )
    keep = tuple(k.keep for k, _, _ in recipe.launches)
    replays.add(args, kwargs, recipe.allocations, kernels, recipe.result, keep)


def forget_all() -> None:
    """Drop all recipes: after a fork they are the parent's."""
    for replays in _all:
        replays.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget_all)


def _checked(replays: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Make the call both ways on the same memory and compare what came out.

    The function runs twice, with results full of zeros and of ones at first: bits that then differ
    are those that the op leaves unspecified.
    """
    if torch.cuda.is_current_stream_capturing():
        return replays(*args, **kwargs)
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    before = [t.clone() for t in tensors]
    outcomes = []
    for call in (replays, _filled(function, 0x00), _filled(function, 0xFF)):
        for tensor, old in zip(tensors, before, strict=True):
            tensor.copy_(old)
        result = call(*args, **kwargs)
        outcomes.append([_launch.bits_of(t).clone() for t in (*tensors, *_results(result))])
    for found, wanted, other in zip(*outcomes, strict=True):
        specified = wanted == other
        if not torch.equal(found[specified], wanted[specified]):
            raise HwfuseError(
                f"HWFUSE_CHECK_LAUNCH: {function.__name__} gives other bits when it is replayed; "
                "please report it, with HWFUSE_LAUNCH=triton it does not happen"
            )
    return result


def _filled(function: Callable[..., Any], byte: int) -> Callable[..., Any]:
    """Return *function* with results that are full of *byte* before its kernels write them."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with _launch.filling(byte):
            return function(*args, **kwargs)

    return call


def _results(result: Any) -> list[Tensor]:
    if result is None:
        return []
    return [result] if isinstance(result, Tensor) else list(result)

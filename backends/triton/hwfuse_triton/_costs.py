"""What launching costs on the host, for `hwfuse bench dispatch --device cuda`.

Everything is called as a user calls it, on one row, the queue of the GPU never full; windows of all
contenders take turns, the median of the rounds counts.  The measure is a bare ``kernel[grid](...)``
of the same run.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import statistics
import timeit
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
from torch import Tensor

import hwfuse
from hwfuse import testing
from hwfuse_triton import _launch, _native, _replay

_CALLS = 120  # per window

Way = Callable[[], AbstractContextManager[Any]]
Contender = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Way]


@triton.jit(do_not_specialize=["n"])
def bare_kernel(x_ptr, y_ptr, z_ptr, n, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    i = tl.arange(0, A)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    tl.store(y_ptr + i, x * B, mask=i < n)
    tl.store(z_ptr + i, x * C, mask=i < n)


def launch_costs(implementations: dict[str, Callable[..., Any]], rounds: int) -> dict[str, Any]:
    """Return µs per call: of the bare launch, and of the parts of each op.

    Args:
        implementations: Op name to what launches it.
        rounds: Windows per contender.
    """
    x, y, z = (torch.ones(128, device="cuda") for _ in range(3))

    def bare(n: int) -> None:
        bare_kernel[(1,)](x, y, z, n, A=128, B=2, C=3)

    contenders: dict[tuple[str, str], Contender] = {("", "bare"): (bare, (64,), {}, nullcontext)}
    about = {}
    with contextlib.ExitStack() as stack:
        for op, registered in implementations.items():
            parts, about[op] = _parts(op, registered, stack)
            contenders |= {(op, name): part for name, part in parts.items()}
        times = _times(contenders, rounds)
    rows = [
        {"op": op, **facts, "us": {n: us for (o, n), us in times.items() if o == op}}
        for op, facts in about.items()
    ]
    return {"bare_us": times["", "bare"], "ops": rows}


def _parts(
    op: str, registered: Callable[..., Any], stack: contextlib.ExitStack
) -> tuple[dict[str, Contender], dict[str, int]]:
    """Return what is timed of one op, and how many tensors and kernels a call of it makes."""
    spec = hwfuse.op(op).spec
    args, kwargs = spec.split(spec.make_inputs(m=1, device="cuda"))
    function = inspect.unwrap(registered)
    tiers = {"tier 1": _replay.wrapped(None, function)}
    if not torch.version.hip and (native := _native.load()):
        tiers["tier 2"] = _replay.wrapped(native, function)
    calls = _launches(function, args, kwargs)
    results = _tensors(function(*args, **kwargs))
    made = [(tuple(t.shape), t.stride(), t.dtype) for t in results if not any(t is a for a in args)]

    def allocate() -> list[Tensor]:
        return [_launch.empty(args[0], shape, dtype, strides) for shape, strides, dtype in made]

    def launch() -> None:
        for one, programs, arguments in calls:
            one(programs, *arguments)

    parts: dict[str, Contender] = {
        "sizes": (spec.sizes, args, kwargs, nullcontext),
        "allocation": (allocate, (), {}, nullcontext),
        "launch, tier 0": (launch, (), {}, _ordinary),
        "launch, plan": (launch, (), {}, nullcontext),
        "direct, tier 0": (function, args, kwargs, _ordinary),
        "direct, plan": (function, args, kwargs, nullcontext),
    }
    for tier, one in tiers.items():
        name = f"launch/{tier.replace(' ', '')}"
        stack.enter_context(testing.implementation(op, name, one))
        way = functools.partial(_chosen, op, name)
        parts[f"direct, {tier}"] = (one, args, kwargs, nullcontext)
        parts[f"op, {tier}"] = (hwfuse.op(op), args, kwargs, way)
    return parts, {"outputs": len(made), "launches": len(calls)}


@contextlib.contextmanager
def _chosen(op: str, name: str) -> Iterator[None]:
    """Choose an implementation as a configuration does: nothing is left to do per call."""
    hwfuse.configure({"ops": {op: name}})
    try:
        yield
    finally:
        hwfuse.configure(None)


@contextlib.contextmanager
def _ordinary() -> Iterator[None]:
    """Make every launch an ordinary one."""

    def launch(self: Any, programs: int, *arguments: Any) -> None:
        self.kernel[(programs,)](*arguments, **self.keywords)

    with mock.patch.object(_launch.Launch, "__call__", launch):
        yield


def _launches(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[tuple[Any, int, tuple[Any, ...]]]:
    """Return the launches that a call makes."""
    calls = []

    def launch(self: Any, programs: int, *arguments: Any) -> None:
        calls.append((self, programs, arguments))
        self.ordinary(programs, arguments)

    with mock.patch.object(_launch.Launch, "__call__", launch):
        function(*args, **kwargs)
    return calls


def _tensors(result: Any) -> list[Tensor]:
    return [] if result is None else [result] if isinstance(result, Tensor) else list(result)


def _times(contenders: dict[tuple[str, str], Contender], rounds: int) -> dict[Any, float]:
    timers = {}
    for name, (call, args, kwargs, _) in contenders.items():
        scope = {"call": call, **{f"x{i}": a for i, a in enumerate(args)}, **kwargs}
        values = [*(f"x{i}" for i in range(len(args))), *(f"{key}={key}" for key in kwargs)]
        timers[name] = timeit.Timer(f"call({', '.join(values)})", globals=scope)
    windows: dict[Any, list[float]] = {name: [] for name in timers}
    with torch.no_grad():
        for turn in range(rounds + 1):
            for name, timer in timers.items():
                with contenders[name][3]():
                    torch.cuda.synchronize()
                    timer.timeit(3)
                    seconds = timer.timeit(_CALLS) / _CALLS
                if turn:
                    windows[name].append(seconds * 1e6)
    return {name: statistics.median(values) for name, values in windows.items()}

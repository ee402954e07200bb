"""`hwfuse bench dispatch`: what hwfuse itself costs.

All contestants have one body that returns ready tensors, so what differs is the way to it.  Thread
CPU time, garbage collection off, short windows that take turns, the median of the rounds' medians;
under torch.no_grad, as models are served.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import subprocess
import sys
import time
import timeit
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pluggy
import torch
from torch import Tensor

import hwfuse
from hwfuse import _state
from hwfuse._cli._output import emit, heading, progress, say, table

OP = "fused_qkvzba"
FACTS = (
    "m <= 64",
    "head_k_dim in (8, 128)",
    "qkvz.dtype in (bfloat16, float16)",
    "ba.dtype == qkvz.dtype",
    "qkvz.shape[1] % 32 == 0",
    "qkvz.is_contiguous()",
)
MOST_SELECTION = 1.0  # µs over the direct call
MOST_IMPORT = 0.1  # s over torch
_WINDOW = 0.002  # s
_WINDOWS = 25  # per round and contestant
_COLD_CALLS = 100
_DIRECT = "the implementation, called directly"
_SELECTED = "hwfuse.op, six facts"
_SCOPED = "hwfuse.op, six facts, inside hwfuse.using"
_GRADIENTS = "hwfuse.op, six facts, with gradients enabled"
_BOUND = "hwfuse.op(…).bind"

_kept: list[Any] = []

Call = tuple[Callable[..., Any], Callable[[], AbstractContextManager[Any]]]


def run(options: argparse.Namespace) -> int:
    """Measure and print."""
    if options.device == "cuda":
        from hwfuse._cli import _bench_launch

        return _bench_launch.run(options)
    with progress("bench") as step, torch.no_grad():
        warm = _warm(options.rounds, step)
        cold = _cold()
        step(1, 1, "import hwfuse")
        seconds = statistics.median(_import_seconds() for _ in range(options.rounds))
    limits = [
        (_SELECTED, warm[_SELECTED]["over_direct_us"], MOST_SELECTION, "µs over direct"),
        (_SCOPED, warm[_SCOPED]["over_direct_us"], MOST_SELECTION, "µs over direct"),
        ("import hwfuse", seconds, MOST_IMPORT, "s over import torch"),
    ]
    if options.json:
        emit({"python": sys.version.split()[0], "torch": torch.__version__, "warm": warm,
              "cold_us": cold, "import_seconds": seconds})  # fmt: skip
    else:
        _show(warm, cold, limits)
    return int(options.check and any(found > most for _, found, most, _ in limits))


def _show(
    warm: dict[str, dict[str, float]],
    cold: dict[str, float],
    limits: Sequence[tuple[str, float, float, str]],
) -> None:
    rows = [
        (name, f"{each['us']:.2f}", f"{each['over_direct_us']:+.2f}")
        for name, each in warm.items()
    ]  # fmt: skip
    table(("every call", "µs", "over direct"), rows)
    say()
    table(("once", "µs"), [(name, f"{us:.0f}") for name, us in cold.items()])
    heading("Limits")
    for name, found, most, unit in limits:
        say(f"  {'ok  ' if found <= most else 'OVER'}  {name}: {found:.2f} {unit}, at most {most}")
    say("\nWhat launching a kernel costs needs a GPU: hwfuse bench dispatch --device cuda")


def _warm(rounds: int, step: Callable[[int, int, str], None]) -> dict[str, dict[str, float]]:
    """Return for each contestant its µs per call and what that is over the direct call."""
    medians: dict[str, list[float]] = {}
    with _contestants() as calls:
        timers = {name: _timer(function) for name, (function, _) in calls.items()}
        loops: dict[str, int] = {}
        for name, timer in timers.items():
            with calls[name][1]():
                timer.timeit(100)  # decides, compiles, fills caches
                loops[name] = max(1, int(_WINDOW / (timer.timeit(1000) / 1000)))
        for done in range(rounds):
            step(done, rounds, "every call")
            windows: dict[str, list[float]] = {name: [] for name in timers}
            for _ in range(_WINDOWS):
                for name, timer in timers.items():
                    with calls[name][1]():
                        windows[name].append(timer.timeit(loops[name]) / loops[name])
            for name, values in windows.items():
                medians.setdefault(name, []).append(statistics.median(values) * 1e6)
    return {name: _summary(values, medians[_DIRECT]) for name, values in medians.items()}


def _summary(values: Sequence[float], direct: Sequence[float]) -> dict[str, float]:
    over = [value - base for value, base in zip(values, direct, strict=True)]
    return {"us": statistics.median(values), "over_direct_us": statistics.median(over)}


def _timer(function: Callable[..., Any]) -> timeit.Timer:
    """Time the call as a user writes it: tensors by position, the rest by keyword."""
    by_name = isinstance(function, pluggy.HookCaller)  # hooks know no positions
    tensors = "qkvz=qkvz, ba=ba" if by_name else "qkvz, ba"
    statement = f"call({tensors}, head_k_dim=8, head_v_dim=8)"
    names = {"call": function, "qkvz": _inputs()["qkvz"], "ba": _inputs()["ba"]}
    return timeit.Timer(statement, globals=names, timer=time.thread_time)


@contextmanager
def _contestants() -> Iterator[dict[str, Call]]:
    """Yield the ways to make one call, each with the context to make it in."""
    from hwfuse import testing

    op: Any = hwfuse.op(OP)
    with (
        testing.implementation(OP, "bench/six", fused_qkvzba, requires={"facts": FACTS}),
        testing.implementation(OP, "bench/none", fused_qkvzba),
    ):
        with hwfuse.using(**{OP: "bench/none"}):
            bound = op.bind(device="cpu")
        node, custom = _torch_nodes()
        yield {
            _DIRECT: (fused_qkvzba, nullcontext),
            _SELECTED: (op, nullcontext),
            _GRADIENTS: (op, torch.enable_grad),
            _SCOPED: (op, lambda: hwfuse.using(**{OP: ["bench/six"]})),
            _BOUND: (bound, nullcontext),
            "a pluggy hook, one plugin, firstresult": (_hook(), nullcontext),
            "a torch node: Library.define and impl": (node, nullcontext),
            "a torch node: torch.library.custom_op": (custom, nullcontext),
        }


@functools.cache
def _inputs() -> dict[str, Any]:
    sizes = {"m": 4, "num_k_heads": 2, "num_v_heads": 4, "head_k_dim": 8, "head_v_dim": 8}
    return hwfuse.op(OP).spec.make_inputs(**sizes)


@functools.cache
def _result() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs: tuple[Tensor, Tensor, Tensor, Tensor] = hwfuse.op(OP).spec.outputs(**_inputs())
    return outputs


def fused_qkvzba(
    qkvz: Tensor,  # noqa: ARG001 - the op's signature
    ba: Tensor,  # noqa: ARG001
    *,
    head_k_dim: int,  # noqa: ARG001
    head_v_dim: int,  # noqa: ARG001
    layout: str = "interleaved",  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ready tensors: the body of every contestant."""
    return _result()


@functools.cache
def _torch_nodes() -> tuple[Any, Any]:
    """Register the body with torch in both ways; once, torch refuses a second time."""
    library = torch.library.Library("hwfuse_bench", "FRAGMENT")
    schema = hwfuse.op(OP).spec.schema
    library.define(OP + schema)
    library.impl(OP, fused_qkvzba, "CompositeExplicitAutograd")
    _kept.append(library)  # torch forgets what a library defined when the library goes
    custom = torch.library.custom_op(
        f"hwfuse_bench::{OP}_custom", fused_qkvzba, mutates_args=(), schema=schema
    )
    return getattr(torch.ops.hwfuse_bench, OP).default, custom


def _hook() -> Any:
    class Specification:
        @pluggy.HookspecMarker("bench")(firstresult=True)
        def fused_qkvzba(self, qkvz: Tensor, ba: Tensor, head_k_dim: int, head_v_dim: int) -> Any:
            """Stand for the op as a pluggy hook."""

    class Plugin:
        @pluggy.HookimplMarker("bench")
        def fused_qkvzba(
            self,
            qkvz: Tensor,  # noqa: ARG002 - what the hook takes
            ba: Tensor,  # noqa: ARG002
            head_k_dim: int,  # noqa: ARG002
            head_v_dim: int,  # noqa: ARG002
        ) -> Any:
            return _result()

    manager = pluggy.PluginManager("bench")
    manager.add_hookspecs(Specification)
    manager.register(Plugin())
    return manager.hook.fused_qkvzba


def _cold() -> dict[str, float]:
    """Return µs of what happens once per kind of call, or never in production."""
    op: Any = hwfuse.op(OP)
    args, kwargs = op.spec.split(_inputs())
    explain = functools.partial(hwfuse.explain, OP)
    with _contestants():
        return {
            "first call of its kind, after a change of settings": _once(
                lambda: op(*args, **kwargs), prepare=_state.forget
            ),
            "explain of a call": _once(lambda: explain(*args, **kwargs)),
            "explain for rocm:gfx950": _once(lambda: explain(device="rocm:gfx950", m=4)),
        }


def _once(call: Callable[[], Any], prepare: Callable[[], None] | None = None) -> float:
    """Return the median µs of *call*, each time after *prepare*."""
    times = []
    for _ in range(_COLD_CALLS):
        if prepare:
            prepare()
        start = time.thread_time()
        call()
        times.append(time.thread_time() - start)
    return statistics.median(times) * 1e6


def _import_seconds() -> float:
    """Return the CPU seconds that ``import hwfuse`` adds in a process that has torch."""
    clock = "time.process_time()"
    code = f"import time, torch; t = {clock}; import hwfuse; print({clock} - t)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)

"""`hwfuse bench [OP …]`: the reference beside naive loops, or implementations beside it on a GPU.

The inputs are those that `make_inputs` gives by default: a real model's sizes, smaller where a loop
would take seconds.  On a CPU: its time in one thread, so that neither other programs nor the number
of cores decide; calls take turns and the median of the rounds counts.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from hwfuse import _device, _spec, _state, testing
from hwfuse._cli._output import emit, heading, progress, say, table
from hwfuse._cli._threads import one_thread
from hwfuse._errors import HwfuseError
from hwfuse._implementation import REFERENCE
from hwfuse.testing import _cases, _matrix, _values, naive
from hwfuse.testing._cases import Case, NotTaken, Place
from hwfuse.testing._memory import Memory
from hwfuse.testing.compare import compare

_LOOP = "naive/loop"
_WINDOW = 0.02  # s; shorter calls are repeated to fill it
_PER_GRAPH = 20  # calls; one replay then takes longer than its launch
_REPLAYS = 20  # per round
_ENOUGH = 0.5  # s; of slower calls fewer are made, three at least
_FOR_A_LOOP: dict[str, dict[str, int]] = {
    "fp8_blockscale_gemm": {"m": 16, "n": 2048, "k": 2048},
    "w4a8_grouped_gemm": {"m": 64, "n": 512, "k": 2048, "num_experts": 32},
    "w4a8_moe": {"m": 8, "n": 256, "k": 2048, "num_experts": 32},
}

Row = dict[str, Any]


def run(options: argparse.Namespace) -> int:
    """Measure the ops and print; 1 if an implementation is wrong."""
    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise HwfuseError(
            "--device cuda: torch finds no GPU here; --device cpu measures without one"
        )
    names = options.what or list(_spec.names())
    rows: list[Row] = []
    with progress("bench") as step, torch.no_grad(), one_thread():
        for done, op in enumerate(names):
            step(done, len(names), op)
            keywords = {} if on_gpu else dict(_FOR_A_LOOP.get(op, {}))
            if options.m is not None:
                keywords["m"] = options.m
            rows += (_on_gpu if on_gpu else _on_cpu)(op, keywords, options.rounds)
    if options.json:
        about = {"torch": torch.__version__, "threads": 1, "rounds": options.rounds}
        emit({"device": _name(options.device), **about, "ops": rows})
    else:
        (_show_gpu if on_gpu else _show_cpu)(rows)
        for row in rows:
            if row["wrong"]:
                say(f"\nWRONG, not timed: {row['op']}: {row['wrong']}")
    return int(any(row["wrong"] for row in rows))


def _on_cpu(op: str, keywords: Mapping[str, Any], rounds: int) -> Iterator[Row]:
    """Yield the one row of an op: its reference beside its loop."""
    loop: Callable[..., Any] = getattr(naive, op)
    place = Place("cpu", "cpu")
    with testing.implementation(op, _LOOP, loop):
        case = Case(op, _LOOP, place, keywords)
        wrong = _wrong(case)
        calls = [_call(Case(op, name, place, keywords)) for name in (REFERENCE, _LOOP)]
        times = [] if wrong else _medians(calls, rounds)
    reference, naive_time = times or (None, None)
    yield {
        "op": op,
        "sizes": _sizes(case),
        "reference_ms": reference,
        "naive_ms": naive_time,
        "ratio": times[1] / times[0] if times else None,
        "wrong": wrong,
    }


def _on_gpu(op: str, keywords: Mapping[str, Any], rounds: int) -> Iterator[Row]:
    """Yield a row for each implementation that may run here, the reference first."""
    target = str(_device.target_of(torch.device("cuda")))
    found = _state.registry().implementations(op)
    reference_us = None
    for name in sorted(found, key=lambda name: name != REFERENCE):
        places = [p for p in _cases.places(found[name], None) if p.device == "cuda"]
        if not places:
            continue
        case = Case(op, name, Place(target, "cuda"), keywords)
        row: Row = {"op": op, "sizes": _sizes(case), "implementation": name}
        row |= dict.fromkeys(("us", "how", "ratio", "wrong"))
        row["left_out"] = found[name].problem
        if not row["left_out"]:
            try:
                row["wrong"] = _wrong(case)
                if not row["wrong"]:
                    row["us"], row["how"] = _gpu_us(_call(case), rounds)
            except NotTaken as reason:
                row["left_out"] = str(reason)
        if row["us"]:
            reference_us = reference_us or row["us"]
            row["ratio"] = reference_us / row["us"]
        yield row


def _wrong(case: Case) -> str | None:
    """Call through the op and compare every output as the spec says."""
    arguments = case.arguments()
    _values.require_taken(case, arguments)
    expected = _values.reference_results(case, arguments)
    try:
        found = _values.pinned_results(case, Memory(arguments).arguments)
    except testing.ParityError as error:
        return str(error)
    for name, comparator in case.spec.compare.items():
        if text := compare(comparator, found[name], expected[name], {**arguments, **found}):
            return f"{case.implementation}: output {name}: {text}"
    return None


def _call(case: Case) -> Callable[[], Any]:
    """Return a call of the implementation itself, on inputs of its own."""
    function = case.record.load()
    args, kwargs = case.spec.split(_values.resolved(Memory(case.arguments()).arguments))
    return lambda: function(*args, **kwargs)


def _medians(calls: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """Return for each call its median time in ms."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, found in zip(calls, times, strict=True):
            start, count = time.thread_time(), 0
            while not count or time.thread_time() - start < _WINDOW:
                call()
                count += 1
            found.append((time.thread_time() - start) / count * 1e3)
    return [statistics.median(found) for found in times]


def _gpu_us(call: Callable[[], Any], rounds: int) -> tuple[float, str]:
    """Return the median µs of a call and how it was made: in a replayed graph if it can be."""
    if _waits_for_the_gpu(call):
        return _event_us(call, rounds * _REPLAYS), "eager"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_PER_GRAPH):
            call()
    return _event_us(graph.replay, rounds * _REPLAYS) / _PER_GRAPH, "graph"


def _waits_for_the_gpu(call: Callable[[], Any]) -> bool:
    """Tell whether the host reads results, which cannot be captured; also warms the call up."""
    stream, before = torch.cuda.Stream(), torch.cuda.get_sync_debug_mode()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with warnings.catch_warnings(), torch.cuda.stream(stream):
            warnings.simplefilter("ignore")  # that this mode is a prototype
            call()
            torch.cuda.set_sync_debug_mode("error")
            call()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
        torch.cuda.synchronize()
    return False


def _event_us(call: Callable[[], Any], count: int) -> float:
    call()
    times: list[float] = []
    while len(times) < 3 or (len(times) < count and sum(times) < _ENOUGH * 1e6):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


def _sizes(case: Case) -> dict[str, int]:
    keywords = _matrix.defaults(case.spec) | dict(case.keywords)
    hidden = ("row_pad", "seed")
    return {k: v for k, v in keywords.items() if type(v) is int and k not in hidden}


def _shape(row: Row) -> str:
    return " ".join(f"{name}={value}" for name, value in row["sizes"].items())


def _name(device: str) -> str:
    return "cpu" if device == "cpu" else torch.cuda.get_device_name()


def _show_cpu(rows: Sequence[Row]) -> None:
    say(
        f"A CPU run in one thread, torch {torch.__version__}: "
        "the reference beside loops over tokens, heads and experts."
    )
    say()
    cells = [
        (row["op"], _shape(row), f"{row['reference_ms']:.2f}", f"{row['naive_ms']:.1f}",
         f"{row['ratio']:.0f}x" if row["ratio"] >= 10 else f"{row['ratio']:.1f}x")
        for row in rows if not row["wrong"]
    ]  # fmt: skip
    table(("op", "shape", "reference ms", "naive ms", "ratio"), cells)


def _show_gpu(rows: Sequence[Row]) -> None:
    say(f"On {_name('cuda')}, torch {torch.__version__}; each call's inputs stay in its caches.")
    say("graph: replayed CUDA graph; eager: the host waits in it, so its time is in the number.")
    say()
    timed = [
        (row["op"], _shape(row), row["implementation"], f"{row['us']:.2f}", row["how"],
         f"{row['ratio']:.1f}x")
        for row in rows if row["us"]
    ]  # fmt: skip
    table(("op", "shape", "implementation", "µs", "how", "speedup"), timed)
    if left_out := [row for row in rows if row["left_out"]]:
        heading("Left out")
        for row in left_out:
            say(f"  {row['op']}, {row['implementation']}: {row['left_out']}")

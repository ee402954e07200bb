"""`hwfuse bench [OP …]` on a CPU: the reference beside naive loops.

The inputs are those that `make_inputs` gives by default: a real model's sizes, smaller where a loop
would take seconds.  On a CPU: its time in one thread, so that neither other programs nor the number
of cores decide; calls take turns and the median of the rounds counts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from hwfuse import _spec, testing
from hwfuse._cli._output import emit, progress, say, table
from hwfuse._cli._threads import one_thread
from hwfuse._implementation import REFERENCE
from hwfuse.testing import _matrix, _values, naive
from hwfuse.testing._cases import Case, Place
from hwfuse.testing._memory import Memory
from hwfuse.testing.compare import compare

_LOOP = "naive/loop"
_WINDOW = 0.02  # s; shorter calls are repeated to fill it
_FOR_A_LOOP: dict[str, dict[str, int]] = {
    "fp8_blockscale_gemm": {"m": 16, "n": 2048, "k": 2048},
    "w4a8_grouped_gemm": {"m": 64, "n": 512, "k": 2048, "num_experts": 32},
    "w4a8_moe": {"m": 8, "n": 256, "k": 2048, "num_experts": 32},
}

Row = dict[str, Any]


def run(options: argparse.Namespace) -> int:
    """Measure the ops and print; 1 if one is wrong."""
    names = options.what or list(_spec.names())
    rows: list[Row] = []
    with progress("bench") as step, torch.no_grad(), one_thread():
        for done, op in enumerate(names):
            step(done, len(names), op)
            keywords = dict(_FOR_A_LOOP.get(op, {}))
            if options.m is not None:
                keywords["m"] = options.m
            rows.append(_row(op, keywords, options.rounds))
    if options.json:
        about = {"torch": torch.__version__, "threads": 1, "rounds": options.rounds}
        emit({"device": "cpu", **about, "ops": rows})
    else:
        _show(rows)
        for row in rows:
            if row["wrong"]:
                say(f"\nWRONG, not timed: {row['op']}: {row['wrong']}")
    return int(any(row["wrong"] for row in rows))


def _row(op: str, keywords: Mapping[str, Any], rounds: int) -> Row:
    """Measure an op: its reference beside its loop."""
    loop: Callable[..., Any] = getattr(naive, op)
    place = Place("cpu", "cpu")
    with testing.implementation(op, _LOOP, loop):
        case = Case(op, _LOOP, place, keywords)
        wrong = _wrong(case)
        calls = [_call(Case(op, name, place, keywords)) for name in (REFERENCE, _LOOP)]
        times = [] if wrong else _medians(calls, rounds)
    reference, naive_time = times or (None, None)
    return {
        "op": op,
        "sizes": _sizes(case),
        "reference_ms": reference,
        "naive_ms": naive_time,
        "ratio": times[1] / times[0] if times else None,
        "wrong": wrong,
    }


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


def _sizes(case: Case) -> dict[str, int]:
    keywords = _matrix.defaults(case.spec) | dict(case.keywords)
    hidden = ("row_pad", "seed")
    return {k: v for k, v in keywords.items() if type(v) is int and k not in hidden}


def _shape(row: Row) -> str:
    return " ".join(f"{name}={value}" for name, value in row["sizes"].items())


def _show(rows: Sequence[Row]) -> None:
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

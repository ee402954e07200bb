"""`hwfuse bench dispatch --device cuda`: what a call costs the host, beside a bare kernel launch.

The numbers come from the plugins that launch kernels of their own (`launch_costs`).  A host may be
twice as fast as another, so the goals are multiples of a bare launch measured in the same run.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Any

import torch

from hwfuse import _state
from hwfuse._cli._output import emit, heading, progress, say, table
from hwfuse._errors import HwfuseError

# One or two results by one kernel; each further result; each further kernel.
GOALS = {"op, tier 1": (0.85, 0.1, 0.4), "op, tier 2": (0.60, 0.1, 0.3)}
_WAYS = {
    "sizes": "the check of a call",
    "allocation": "all results",
    "launch, tier 0": "all kernels, kernel[grid](…)",
    "launch, plan": "all kernels, by their plans",
    "direct, tier 0": "the implementation, kernel[grid](…)",
    "direct, plan": "the implementation, first calls of a kind",
    "direct, tier 1": "the implementation, replayed in Python",
    "op, tier 1": "hwfuse.op, replayed in Python",
    "direct, tier 2": "the implementation, replayed in C",
    "op, tier 2": "hwfuse.op, replayed in C",
}


def run(options: argparse.Namespace) -> int:
    """Measure and print; with --check, 1 if a goal is missed."""
    if not torch.cuda.is_available():
        raise HwfuseError(
            "--device cuda: torch finds no GPU here; --device cpu measures the choice alone"
        )
    with progress("bench") as step:
        step(0, 1, "launches")
        found = [_costs(name, options.rounds) for name in _state.registry().backends]
        results = [one for one in found if one]
    if not results:
        raise HwfuseError("no plugin for this GPU launches kernels of its own")
    goals = [goal for result in results for goal in _goals(result)]
    if options.json:
        emit({
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(),
            "results": results,
            "goals": goals,
        })  # fmt: skip
    else:
        for result in results:
            _show(result)
        heading("Goals")
        for goal in goals:
            word = "ok  " if goal["ratio"] <= goal["goal"] else "OVER"
            say(f"  {word}  {goal['op']}, {goal['way']}: {goal['ratio']:.2f} x, at most "
                f"{goal['goal']:.2f}")  # fmt: skip
    return int(options.check and any(goal["ratio"] > goal["goal"] for goal in goals))


def _costs(name: str, rounds: int) -> dict[str, Any] | None:
    """Ask one plugin what its launches cost."""
    backend = _state.registry().backends[name]
    look = getattr(importlib.import_module(backend.package), "launch_costs", None)
    found: dict[str, Any] | None = look(rounds) if look else None
    return found


def _goals(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what each op reaches and should reach, as multiples of the bare launch."""
    goals = []
    for row in result["ops"]:
        for way, (base, output, kernel) in GOALS.items():
            if way in row["us"]:
                goal = base + output * max(0, row["outputs"] - 2) + kernel * (row["launches"] - 1)
                ratio = row["us"][way] / result["bare_us"]
                goals.append({"op": row["op"], "way": way, "ratio": ratio, "goal": goal})
    return goals


def _show(result: dict[str, Any]) -> None:
    bare = result["bare_us"]
    say(f"a bare kernel[grid](…): {bare:.2f} µs of the host, on {torch.cuda.get_device_name()}")
    for row in result["ops"]:
        heading(f"{row['op']}: {row['outputs']} new tensors, {row['launches']} kernels")
        rows = [(name, f"{us:.2f}", f"{us / bare:.2f}", _WAYS.get(name, ""))
                for name, us in row["us"].items()]  # fmt: skip
        table(("what", "µs", "x bare", ""), rows)

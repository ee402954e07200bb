"""Choose, import and compile before it matters; compiled kernels stay in their caches on disk.

hwfuse warmup fused_qkvzba --m 1,64,4096 --num-v-heads 32
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from typing import Any

import hwfuse
from hwfuse._cli import _sizes
from hwfuse._cli._output import emit, progress, table


def arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Declare the options."""
    _sizes.add(parser, words, many=True)
    parser.add_argument("--device", metavar="D", help="torch device; default: the accelerator here")
    parser.add_argument("--json", action="store_true", help="print the decisions as JSON")


def run(options: argparse.Namespace) -> int:
    """Run the op once for each combination of sizes."""
    given = _sizes.given(options)
    values = [value if isinstance(value, list) else [value] for value in given.values()]
    combinations = [dict(zip(given, each, strict=True)) for each in itertools.product(*values)]
    results: list[tuple[dict[str, Any], hwfuse.Decision, float]] = []
    with progress(f"warmup {options.op}") as step:
        for done, sizes in enumerate(combinations):
            text = " ".join(f"{name}={value}" for name, value in sizes.items()) or "default sizes"
            step(done, len(combinations), text)
            start = time.perf_counter()
            (decision,) = hwfuse.warmup(options.op, device=options.device, **sizes)
            results.append((sizes, decision, time.perf_counter() - start))
    if options.json:
        emit([decision.to_dict() | {"seconds": seconds} for _, decision, seconds in results])
        return 0
    rows = [
        (" ".join(f"{k}={v}" for k, v in sizes.items()) or "default sizes",
         decision.chosen, f"{seconds:.2f} s")
        for sizes, decision, seconds in results
    ]  # fmt: skip
    table((options.op, "runs", "first call"), rows)
    return 0

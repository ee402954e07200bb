"""Say which implementation a call would run and why, also for hardware that is not here.

hwfuse explain fp8_blockscale_gemm --device rocm:gfx950 --m 64 --n 7168 --k 2048
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import hwfuse
from hwfuse._cli import _sizes
from hwfuse._cli._output import emit, say


def arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Declare the options."""
    _sizes.add(parser, words)
    parser.add_argument(
        "--device", metavar="D", help="cuda:sm90, rocm:gfx950, cuda:0, cpu; default: this machine's"
    )
    parser.add_argument("--json", action="store_true", help="print the decision as JSON")


def run(options: argparse.Namespace) -> int:
    """Print one decision; 1 if nothing can run the call."""
    decision = hwfuse.explain(options.op, device=options.device, **_sizes.given(options))
    if options.json:
        emit(decision.to_dict())
    else:
        say(str(decision))
    return 0 if decision.chosen else 1

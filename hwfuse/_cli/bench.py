"""Measure the ops, or what hwfuse itself costs: `hwfuse bench dispatch`.

On a CPU: the reference of each op beside a naive Python loop.  With ``--device cuda``: every
implementation that runs there.  Nothing is timed before its results have been compared with the
reference's; the exit code is 1 if some are wrong.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from hwfuse import _spec
from hwfuse._errors import InputError, suggestion

DISPATCH = "dispatch"


def arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:  # noqa: ARG001
    """Declare the options."""
    parser.add_argument(
        "what", nargs="*", type=_what, metavar="OP",
        help="ops to measure, default all; or `dispatch`, alone",
    )  # fmt: skip
    parser.add_argument(
        "--device", default="cpu", choices=["cpu", "cuda"],
        help="where the ops run, default cpu; cuda is ROCm's name too",
    )  # fmt: skip
    parser.add_argument("--m", type=int, metavar="M", help="rows of the ops' inputs")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default 5")
    parser.add_argument("--check", action="store_true", help="dispatch: exit with 1 above a limit")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")


def run(options: argparse.Namespace) -> int:
    """Measure and print."""
    if options.rounds < 1:
        raise InputError("--rounds", options.rounds, "at least 1")
    if DISPATCH not in options.what:
        from hwfuse._cli import _bench_ops

        return _bench_ops.run(options)
    if len(options.what) > 1:
        raise InputError("OP", " ".join(options.what), "dispatch alone, or names of ops")
    from hwfuse._cli import _bench_dispatch

    return _bench_dispatch.run(options)


def _what(word: str) -> str:
    known = (DISPATCH, *_spec.names())
    if word not in known:
        hint = suggestion(word, known)
        raise argparse.ArgumentTypeError(f"{word!r} is no op{hint}; known: {', '.join(known)}")
    return word

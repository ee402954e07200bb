"""Measure the ops, or what hwfuse itself costs: `hwfuse bench dispatch`.

On a CPU: the reference of each op beside a naive Python loop.  With ``--device cuda``: every
implementation that runs there beside the libraries that are installed, at shapes of real models:

hwfuse bench fused_qkvzba --device cuda --against torch,sglang --out results

Nothing is timed before its results have been compared with the reference's; the exit code is 1 if
some are wrong.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from hwfuse import _spec
from hwfuse._errors import InputError, suggestion

DISPATCH = "dispatch"
_ONLY_CUDA = ("shape", "out", "goals", "jobs", "against", "patience", "add")


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
    parser.add_argument("--m", type=_numbers, default=[], metavar="M,…", help="rows of the inputs")
    parser.add_argument("--rounds", type=int, metavar="N", help="default 5; replays on cuda, 11")
    parser.add_argument("--check", action="store_true", help="dispatch: exit with 1 above a limit")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    group = parser.add_argument_group("with --device cuda")
    group.add_argument("--shape", metavar="NAME,…", help="shapes to measure, default all of an op")
    group.add_argument(
        "--against", metavar="LIBRARY,…",
        help="torch, compile, sglang, flashinfer, deepgemm, or none; default torch,compile",
    )  # fmt: skip
    group.add_argument("--out", type=Path, metavar="DIR", help="write bench.csv, .md and .png")
    group.add_argument("--goals", type=Path, metavar="FILE", help="YAML, op: {shape: {m: goal}}")
    group.add_argument("--jobs", type=int, metavar="N", help="processes that compile, default 8")
    group.add_argument(
        "--patience", type=float, metavar="S", help="seconds that one kernel may take, default 300"
    )
    group.add_argument("--add", action="store_const", const=True, help="keep what DIR has already")
    group.add_argument("--redraw", type=Path, metavar="DIR", help="draw its bench.csv again")


def run(options: argparse.Namespace) -> int:
    """Measure and print."""
    if options.redraw:
        from hwfuse._cli import _bench_cuda

        return _bench_cuda.redraw(options)
    if options.rounds is not None and options.rounds < 1:
        raise InputError("--rounds", options.rounds, "at least 1")
    options.rounds = options.rounds or (11 if options.device == "cuda" else 5)
    if DISPATCH in options.what:
        if len(options.what) > 1:
            raise InputError("OP", " ".join(options.what), "dispatch alone, or names of ops")
        from hwfuse._cli import _bench_dispatch

        return _bench_dispatch.run(options)
    if options.device == "cuda":
        from hwfuse._cli import _bench_cuda

        return _bench_cuda.run(options)
    return _on_cpu(options)


def _on_cpu(options: argparse.Namespace) -> int:
    for name in _ONLY_CUDA:
        if getattr(options, name) is not None:
            raise InputError(f"--{name}", "--device cpu", "--device cuda")
    if len(options.m) > 1:
        raise InputError("--m", ",".join(map(str, options.m)), "one number, or --device cuda")
    options.m = options.m[0] if options.m else None
    from hwfuse._cli import _bench_ops

    return _bench_ops.run(options)


def _what(word: str) -> str:
    known = (DISPATCH, *_spec.names())
    if word not in known:
        hint = suggestion(word, known)
        raise argparse.ArgumentTypeError(f"{word!r} is no op{hint}; known: {', '.join(known)}")
    return word


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"found {text!r}, needed numbers: 1,64,4096") from None

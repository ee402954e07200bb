"""The command line, ``hwfuse`` and ``python -m hwfuse``: one file per command.

Each command module has ``arguments(parser, words)`` and ``run(options) -> exit code``; the first
line of its docstring is its help.  Exit codes: 0 good, 1 what was asked for failed, 2 it was asked
for wrongly.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import TextIO

import hwfuse
from hwfuse._cli import bench, config, demo, doctor, explain, ops, parity, warmup
from hwfuse._cli._output import complain
from hwfuse._errors import (
    ConfigError,
    HwfuseError,
    HwfuseWarning,
    InputError,
    UnknownOp,
    suggestion,
)

_COMMANDS: dict[str, ModuleType] = {
    "doctor": doctor,
    "ops": ops,
    "explain": explain,
    "config": config,
    "parity": parity,
    "bench": bench,
    "warmup": warmup,
    "demo": demo,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = [_dashed(word) for word in (sys.argv[1:] if argv is None else argv)]
    try:
        options = _parse(words)
    except SystemExit as stop:  # argparse has printed its help or its error
        return int(stop.code or 0)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        return _run(options)


def _run(options: argparse.Namespace) -> int:
    try:
        return int(options.run(options))
    except HwfuseError as error:
        if options.traceback:
            traceback.print_exc()
        complain(f"hwfuse {options.command}: {error}")
        return 2 if isinstance(error, ConfigError | InputError | UnknownOp) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `hwfuse ops | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="hwfuse",
        description="One call, any accelerator, the fastest correct kernel, and the proof of it.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"hwfuse {hwfuse.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in _COMMANDS.items():
        about = (module.__doc__ or "").partition("\n")[0]
        help_text = about[:1].lower() + about[1:].rstrip(".")
        command = commands.add_parser(
            name, help=help_text, description=module.__doc__, allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        module.arguments(command, words if words[:1] == [name] else [])
        command.add_argument("--traceback", action="store_true", help="show where an error arose")
        command.set_defaults(run=module.run, parser=command)
    if not words:
        parser.print_help(sys.stderr)
        parser.exit(2)
    options, rest = parser.parse_known_args(words)
    if rest:
        flags = re.findall(r"--[\w-]+", options.parser.format_help())
        options.parser.error(f"unknown {rest[0]}{suggestion(rest[0].partition('=')[0], flags)}")
    return options


def _dashed(word: str) -> str:
    """Spell an option with dashes: ``--num_v_heads`` is how the Python keyword looks."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    ours = issubclass(category, HwfuseWarning)
    text = warnings.formatwarning(message, category, filename, lineno, line)
    (file or sys.stderr).write(f"warning: {message}\n" if ours else text)

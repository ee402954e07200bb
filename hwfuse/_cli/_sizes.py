"""Options made of an op's `make_inputs` keywords: ``--m 64 --n 7168 --dtype bfloat16``."""

from __future__ import annotations

import argparse
import ast
import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch

from hwfuse import _facts, _spec
from hwfuse._errors import suggestion

_PREFIX = "make_inputs."  # keeps them apart from a command's own options


def add(parser: argparse.ArgumentParser, words: Sequence[str], *, many: bool = False) -> None:
    """Add the positional ``OP`` and, if *words* name one, an option for each of its keywords.

    Args:
        parser: The command's parser.
        words: The whole command line.
        many: Numbers may be lists: ``--m 1,64,4096``.
    """
    parser.add_argument("op", metavar="OP", type=_op, help="name of the op; see `hwfuse ops`")
    name = next((word for word in words if word in _spec.names()), None)
    if name is None:
        parser.epilog = "Further options are the op's sizes: `OP --help` lists them."
        return
    group = parser.add_argument_group(f"sizes and options of {name}")
    make_inputs = _spec.load(name).make_inputs
    for keyword in inspect.signature(make_inputs, eval_str=True).parameters.values():
        if keyword.name == "device":
            continue  # the command's own option
        kind = _kind(keyword.annotation)
        help_text = kind.__name__
        if keyword.default is not keyword.empty:
            help_text += f", default {_facts.show(keyword.default)}"
        group.add_argument(
            "--" + keyword.name.replace("_", "-"),
            dest=_PREFIX + keyword.name,
            default=argparse.SUPPRESS,
            help=help_text,
            metavar="…",
            type=_many(kind) if many and kind is int else _one(kind),
        )


def given(options: argparse.Namespace) -> dict[str, Any]:
    """Return the keywords that were given, by name."""
    return {
        name.removeprefix(_PREFIX): value
        for name, value in vars(options).items()
        if name.startswith(_PREFIX)
    }


def _op(text: str) -> str:
    if text not in _spec.names():
        known = ", ".join(_spec.names())
        message = f"no op is called {text!r}{suggestion(text, _spec.names())}; ops: {known}"
        raise argparse.ArgumentTypeError(message)
    return text


def _kind(annotation: Any) -> Any:
    """Return the type of a keyword, without its ``| None``."""
    if isinstance(annotation, types.UnionType):
        annotation = next(kind for kind in get_args(annotation) if kind is not types.NoneType)
    return annotation


def _one(kind: Any) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        if kind is torch.dtype and text in _facts.DTYPES:
            return _facts.DTYPES[text]
        if kind is bool and text in ("true", "false"):
            return text == "true"
        if kind in (int, float, str):
            try:
                return kind(text)
            except ValueError:
                pass
        elif kind not in (bool, torch.dtype):
            return ast.literal_eval(text)
        needed = {bool: "true or false", torch.dtype: "a dtype such as bfloat16"}.get(kind)
        message = f"found {text!r}, needed {needed or f'a value of type {kind.__name__}'}"
        raise argparse.ArgumentTypeError(message)

    return read


def _many(kind: Any) -> Callable[[str], list[Any]]:
    one = _one(kind)
    return lambda text: [one(part) for part in text.split(",")]

"""All that is said of a choice: reasons, the text of a decision, errors and warnings.

Not loaded while every choice is as expected and nobody asks.
"""

from __future__ import annotations

import ast
import json
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import CodeType
from typing import Any

from hwfuse import _fact_parser, _facts
from hwfuse._decision import Decision
from hwfuse._errors import ConfigError, HwfuseWarning, NoImplementation, PinnedUnavailable
from hwfuse._facts import Fact
from hwfuse._implementation import REFERENCE
from hwfuse._policy import Order

announced: set[tuple[str, ...]] = set()


def reason(fact: Fact, values: Mapping[str, Any]) -> str:
    """Say why a fact does not hold: the statement and what was found."""
    found = [
        f"{part} = {_facts.show(_facts.evaluate(code, values))}"
        for part, code in _leaves(fact.tree)
    ]
    return f"needs {fact.source}; found {', '.join(found)}"


def _leaves(tree: ast.expr) -> Iterator[tuple[str, CodeType]]:
    """Yield the largest parts of a comparison that name something, with their code."""
    parts: list[ast.expr] = []
    match tree:
        case ast.Compare(left=left, comparators=rest):
            parts = [left, *rest]
        case ast.UnaryOp(operand=ast.Compare(left=left, comparators=rest)):
            parts = [left, *rest]
        case _:
            parts = [tree.operand if isinstance(tree, ast.UnaryOp) else tree]
    for part in parts:
        if any(True for _ in _fact_parser.read_by(part, "")):
            yield ast.unparse(part), _fact_parser.compile_expression(part)


def tell(decision: Decision, order: Order, on_miss: tuple[str, str]) -> None:
    """Raise if nothing runs, or a miss is an error; warn, once, of what the user should know."""
    how, origin = on_miss
    hint = f"more: python -m hwfuse explain {decision.op}"
    if order.pin and not decision.chosen:
        text = f"{order.ids[0]} is pinned by {order.origin} and cannot take this call"
        raise PinnedUnavailable(f"{text}\n{decision}\n{hint}", decision)
    if not decision.chosen:
        raise NoImplementation(f"nothing can take this call\n{decision}\n{hint}", decision)
    if decision.misses and how == "error":
        text = f"{', '.join(decision.misses)} was preferred and cannot run (on_miss, {origin})"
        raise NoImplementation(f"{text}\n{decision}\n{hint}", decision)
    if how == "silent" or decision.pretended:
        return
    for missed in decision.misses:
        reasons = "; ".join(decision.rejected[missed])
        text = f"{decision.op}: {missed} is missed, {decision.chosen} runs: {reasons}. {hint}"
        announce((decision.op, missed, decision.origin), text)
    is_asked_for = REFERENCE in order.named or decision.facts["target"] == "cpu"
    if decision.chosen == REFERENCE and not is_asked_for:
        where = decision.facts["target"]
        text = f"{decision.op} runs the reference on {where}, which is slow. {hint}"
        announce((decision.op, "reference"), text)


def announce(key: tuple[str, ...], text: str) -> None:
    """Warn once per process and key, at the caller's line."""
    if key not in announced:
        announced.add(key)
        level, frame = 1, sys._getframe()  # noqa: SLF001 - inspect.stack reads files
        while frame.f_back and frame.f_globals.get("__name__", "hwfuse").startswith("hwfuse"):
            level, frame = level + 1, frame.f_back  # generated functions have no __name__
        warnings.warn(text, HwfuseWarning, stacklevel=level)


def trace(decision: Decision, path: str) -> None:
    """Append a decision to the file that HWFUSE_TRACE names, as one JSON line."""
    try:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(decision.to_dict()) + "\n")
    except OSError as error:
        raise ConfigError(f"HWFUSE_TRACE: {path}: cannot be written: {error}") from error

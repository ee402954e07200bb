"""Variants: what one implementation does differently for different calls, declared as facts.

``VARIANTS = {"by head": "m <= 256", "by row": "m > 256"}`` in an implementation's file: the first
whose fact holds is what runs.  They change nothing in selection; `explain` shows them, and the
parity harness tries the calls around their thresholds.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hwfuse import _fact_parser, _spec, _state
from hwfuse._decision import Decision
from hwfuse._facts import Fact
from hwfuse._implementation import Implementation
from hwfuse._select import Call


def read(implementation: Implementation) -> dict[str, Fact]:
    """Return the variants of an implementation by name, in its own order."""
    if implementation.path is None or not implementation.path.is_file():
        return {}
    tree = ast.parse(implementation.path.read_text(encoding="utf-8"))
    found: dict[str, Fact] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "VARIANTS":
            declared: Mapping[str, str] = ast.literal_eval(node.value)
            found = {name: _fact_parser.parse(text) for name, text in declared.items()}
    for fact in found.values():
        _fact_parser.check_names(fact, _spec.load(implementation.op).vocabulary)
    return found


def running(implementation: Implementation, values: Mapping[str, Any]) -> str | None:
    """Return ``name: fact`` of the variant that a call with these values runs, if any is named."""
    for name, fact in read(implementation).items():
        if fact.holds(values):
            return f"{name}: {fact.source}"
    return None


def added(decision: Decision, call: Call) -> Decision:
    """Return the decision with the variant of what was chosen among its facts."""
    chosen = _state.registry().implementations(decision.op).get(decision.chosen)
    variant = chosen and running(chosen, call.values)
    if not variant:
        return decision
    return replace(decision, facts={**decision.facts, "variant": variant})

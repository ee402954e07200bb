"""Show the settings in force and where each was set."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from typing import Any

from hwfuse import _policy_file, _spec, _state
from hwfuse._cli._output import emit, heading, table
from hwfuse._policy import BUILT_IN_ORDER, REST, Order, Policy


def arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:  # noqa: ARG001
    """Declare the options."""
    parser.add_argument("--json", action="store_true", help="print the settings as JSON")


def run(options: argparse.Namespace) -> int:
    """Print the settings."""
    data = effective(_state.policy())
    if options.json:
        emit(data)
        return 0
    on_miss = data["on_miss"]
    rows = [("on_miss", on_miss["value"], on_miss["origin"])]
    rows += [("block", item["plugin"], item["origin"]) for item in data["block"]]
    rows += [(name, value, "environment") for name, value in data["environment"].items()]
    table(("setting", "value", "set by"), rows)
    heading("Orders: an op's own stand above *, and the first that applies decides")
    table(("op", "when", "order", "set by"), [_row(item) for item in data["orders"]])
    return 0


def effective(policy: Policy) -> dict[str, Any]:
    """Return what applies, as plain JSON values; overridden settings are left out."""
    value, origin = policy.on_miss
    named = {op for layer in policy.layers for op in layer.ops}
    orders = {op: list(_orders(policy, op)) for op in (*_spec.names(), "*") if op in named}
    everything = orders["*"]
    return {
        "on_miss": {"value": value, "origin": origin},
        "block": [{"plugin": name, "origin": by} for name, by in policy.block.items()],
        "environment": {k: os.environ[k] for k in _policy_file.VARIABLES if k in os.environ},
        "orders": [
            item
            for op, items in orders.items()
            if op == "*" or items != everything
            for item in ({"op": op, **each} for each in items)
        ],
    }


def _orders(policy: Policy, op: str) -> Iterator[dict[str, Any]]:
    """Yield what `Policy.order` would look at for *op*, in its sequence."""
    for layer in policy.layers:
        for entry in (layer.ops[name] for name in (op, "*") if name in layer.ops):
            for rule in entry.rules:
                yield _plain(rule.order, [fact.source for fact in rule.when])
            if entry.order:
                yield _plain(entry.order, [])
                return


def _plain(order: Order, when: list[str]) -> dict[str, Any]:
    ids = BUILT_IN_ORDER if order.ids == (REST,) else order.ids  # all of it is "the rest"
    return {"when": when, "ids": list(ids), "pin": order.pin, "origin": order.origin}


def _row(item: dict[str, Any]) -> tuple[str, str, str, str]:
    order = ", ".join(item["ids"]) + (" (pinned)" if item["pin"] else "")
    return item["op"], " and ".join(item["when"]) or "always", order, item["origin"]

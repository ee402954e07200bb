"""The process's policy, registry and records: the one place of shared state.

Nothing here is read on the hot path but the ContextVar `context`.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

from hwfuse import _plugins
from hwfuse._decision import Decision
from hwfuse._implementation import REFERENCE, Implementation
from hwfuse._plugins import Registry
from hwfuse._policy import BUILT_IN, Layer, Order, Policy

# The layers of the enclosing `using` and `pretend` blocks; None outside of any.
context: ContextVar[Policy | None] = ContextVar("hwfuse_policy", default=None)
# What to call when policy or registry change: each op drops its memo table.
listeners: list[Callable[[], None]] = []
decisions: dict[tuple[Any, ...], Decision] = {}
recorders: list[Any] = []  # each is told of first uses and counts calls
lock = threading.RLock()

_configured: list[Layer] = []
_process: Policy | None = None
_registries: dict[tuple[tuple[str, str], ...], Registry] = {}
_added: dict[str, dict[str, Implementation]] = {}  # Registry.added of every registry


def policy() -> Policy:
    """Return the policy in force here and now, all layers."""
    inner = context.get()
    return _joined(inner, process()) if inner else process()


@functools.cache
def _joined(inner: Policy, outer: Policy) -> Policy:
    return Policy((*inner.layers, *outer.layers))


def process() -> Policy:
    """Return the policy of the process: configure, environment, file, built-in."""
    global _process  # noqa: PLW0603
    with lock:
        if _process is None:
            _process = _checked(_configured)
        return _process


def _checked(configured: list[Layer]) -> Policy:
    if not configured and not any(name.startswith("HWFUSE_") for name in os.environ):
        return Policy((BUILT_IN,))
    from hwfuse import _policy_file

    result = Policy((*configured, *_policy_file.environment(), BUILT_IN))
    _policy_file.validate(result, _load(result.block))
    return result


def install(layers: list[Layer]) -> None:
    """Put *layers* in the place of what `configure` set before; nothing changes if one is wrong."""
    global _process  # noqa: PLW0603
    with lock:
        policy = _checked(layers)
        _configured[:] = layers
        forget()
        _process = policy


def registry() -> Registry:
    """Return the loaded backends, without the blocked ones."""
    return _load(process().block)


def _load(block: Mapping[str, str]) -> Registry:
    key = tuple(sorted(block.items()))
    with lock:
        if key not in _registries:
            _registries[key] = _plugins.load(block, _added)
        return _registries[key]


def forget() -> None:
    """Drop the process policy and every memo table; the next call decides anew."""
    global _process  # noqa: PLW0603
    with lock:
        _process = None
        _joined.cache_clear()
        for listener in listeners:
            listener()


def settle(decision: Decision, order: Order) -> None:
    """Raise if nothing runs or a miss is an error, and say what is not as it was asked for."""
    on_cpu = decision.facts["target"] == "cpu"
    if decision.misses or not decision.chosen or (decision.chosen == REFERENCE and not on_cpu):
        from hwfuse import _report

        _report.tell(decision, order, policy().on_miss)


def first_use(decision: Decision) -> None:
    """Keep and trace the decision of the first call of its kind."""
    for recorder in recorders:
        recorder.note(decision)
    if decision.kind in decisions:
        return
    decisions[decision.kind] = decision
    if path := os.environ.get("HWFUSE_TRACE"):
        from hwfuse import _report

        _report.trace(decision, path)


def _after_fork() -> None:
    """Let a child decide anew: devices, plans and locks of the parent are not its own."""
    global lock  # noqa: PLW0603
    lock = threading.RLock()
    decisions.clear()
    forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

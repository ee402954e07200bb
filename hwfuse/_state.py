"""The process's policy, registry and records: the one place of shared state.

Nothing here is read on the hot path but the ContextVar `context`.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from hwfuse import _plugins, _policy
from hwfuse._decision import Decision
from hwfuse._errors import (
    ConfigError,
    HwfuseWarning,
    NoImplementation,
    PinnedUnavailable,
    UnknownImplementation,
    suggestion,
)
from hwfuse._implementation import REFERENCE, Implementation
from hwfuse._plugins import Registry
from hwfuse._policy import BUILT_IN, Entry, Layer, Order, Policy

VARIABLES = ("HWFUSE_USE", "HWFUSE_CONFIG", "HWFUSE_BLOCK", "HWFUSE_TRACE")

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
_added: dict[str, dict[str, Implementation]] = {}  # by Registry.add: in every registry
_announced: set[tuple[str, ...]] = set()


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
    result = Policy((*configured, *_environment(), BUILT_IN))
    _validate(result, _load(result.block))
    return result


def registry() -> Registry:
    """Return the loaded backends, without the blocked ones."""
    return _load(process().block)


def _load(block: Mapping[str, str]) -> Registry:
    key = tuple(sorted(block.items()))
    with lock:
        if key not in _registries:
            _registries[key] = _plugins.load(block, _added)
        return _registries[key]


def _environment() -> list[Layer]:
    """Read the HWFUSE_* variables, highest layer first; an unknown one is a warning."""
    for name in os.environ:
        if name.startswith("HWFUSE_") and name not in VARIABLES:
            text = f"{name} is not a variable of hwfuse{suggestion(name, VARIABLES)}"
            announce((name,), text)
    layers = []
    if use := os.environ.get("HWFUSE_USE"):
        layers.append(_policy.from_use(use, "HWFUSE_USE"))
    if block := os.environ.get("HWFUSE_BLOCK"):
        names = [name.strip() for name in block.split(",") if name.strip()]
        layers.append(Layer(block=dict.fromkeys(names, "HWFUSE_BLOCK")))
    if path := os.environ.get("HWFUSE_CONFIG"):
        layers.append(_policy.from_file(Path(path)))
    return layers


def configure(settings: Mapping[str, Any] | str | os.PathLike[str] | None = None) -> None:
    """Set the policy of this process, above environment and file; they are read again.

    Args:
        settings: A mapping of the shape of the YAML file, the path of such a file, or None to
            drop what an earlier `configure` set.

    Raises:
        ConfigError: A key, op or id is unknown; the earlier settings stay.
    """
    if settings is None:
        layers = []
    elif isinstance(settings, Mapping):
        layers = [_policy.from_mapping(settings, "hwfuse.configure")]
    else:
        layers = [_policy.from_file(Path(settings))]
    global _process  # noqa: PLW0603
    with lock:
        policy = _checked(layers)  # raises before anything has changed
        _configured[:] = layers
        forget()
        _process = policy


def forget() -> None:
    """Drop the process policy and every memo table; the next call decides anew."""
    global _process  # noqa: PLW0603
    with lock:
        _process = None
        _joined.cache_clear()
        for listener in listeners:
            listener()


@functools.cache
def using_policy(outer: Policy | None, ops: tuple[tuple[str, Any], ...], origin: str) -> Policy:
    """Return the layers inside a ``using`` block: one object per content, so memo keys repeat."""
    entries: dict[str, Entry] = {}
    for op, value in ops:
        _policy.known_op(op, origin)
        entries[op] = Entry(_policy.make_order(value, origin, op))
    layer = Layer(ops=entries)
    _validate(Policy((layer,)), registry())
    return Policy((layer, *(outer.layers if outer else ())))


def _validate(policy: Policy, loaded: Registry) -> None:
    """Raise for an id whose backend is loaded and has no such provider."""
    known = (*loaded.ids(), *loaded.extra_ids())
    for order in policy.orders():
        for identifier in order.named:
            if loaded.unusable(identifier) is None and identifier not in known:
                text = f"{order.origin}: {order.op}: no provider is called {identifier!r}"
                raise UnknownImplementation(text + suggestion(identifier, known))


def settle(decision: Decision, order: Order) -> None:
    """Raise if nothing runs, or a miss is an error; warn, once, of what the user should know."""
    how, origin = policy().on_miss
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
    is_wanted = REFERENCE in order.named
    if decision.chosen == REFERENCE and not is_wanted and decision.facts["target"] != "cpu":
        where = decision.facts["target"]
        text = f"{decision.op} runs the reference on {where}, which is slow. {hint}"
        announce((decision.op, "reference"), text)


def first_use(decision: Decision) -> None:
    """Keep and trace the decision of the first call of its kind."""
    for recorder in recorders:
        recorder.note(decision)
    if decision.kind in decisions:
        return
    decisions[decision.kind] = decision
    if path := os.environ.get("HWFUSE_TRACE"):
        try:
            with Path(path).open("a", encoding="utf-8") as file:
                file.write(json.dumps(decision.to_dict()) + "\n")
        except OSError as error:
            raise ConfigError(f"HWFUSE_TRACE: {path}: cannot be written: {error}") from error


def announce(key: tuple[str, ...], text: str) -> None:
    """Warn once per process and key, at the caller's line."""
    if key not in _announced:
        _announced.add(key)
        level, frame = 1, sys._getframe()  # noqa: SLF001 - inspect.stack reads files
        while frame.f_back and frame.f_globals.get("__name__", "hwfuse").startswith("hwfuse"):
            level, frame = level + 1, frame.f_back  # generated functions have no __name__
        warnings.warn(text, HwfuseWarning, stacklevel=level)


def _after_fork() -> None:
    """Let a child decide anew: devices, plans and locks of the parent are not its own."""
    global lock  # noqa: PLW0603
    lock = threading.RLock()
    decisions.clear()
    forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

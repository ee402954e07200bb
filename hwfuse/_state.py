"""The process's policy, registry and records: the one place of shared state.

Nothing here is read on the hot path but the ContextVar `context`.
"""

from __future__ import annotations

import functools
import json
import os
import threading
import warnings
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from hwfuse import _plugins, _policy, _spec
from hwfuse._decision import Decision
from hwfuse._errors import HwfuseWarning, UnknownImplementation, suggestion
from hwfuse._plugins import Registry
from hwfuse._policy import BUILT_IN, Entry, Layer, Policy

VARIABLES = ("HWFUSE_USE", "HWFUSE_CONFIG", "HWFUSE_BLOCK", "HWFUSE_TRACE")

# The layers of the enclosing `using` and `pretend` blocks; None outside of any.
context: ContextVar[Policy | None] = ContextVar("hwfuse_policy", default=None)
# What to call when policy or registry change: each op drops its memo table.
listeners: list[Callable[[], None]] = []
decisions: dict[tuple[Any, ...], Decision] = {}
# Called with (decision, memo key) for each first use, and with a counter for each call recorded.
recorders: list[Any] = []

_lock = threading.RLock()
_configured: list[Layer] = []
_announced: set[tuple[str, ...]] = set()


def policy() -> Policy:
    """Return the policy in force here and now, all layers."""
    inner = context.get()
    return _joined(inner, process()) if inner else process()


@functools.cache
def _joined(inner: Policy, outer: Policy) -> Policy:
    return Policy((*inner.layers, *outer.layers))


@functools.cache
def process() -> Policy:
    """Return the policy of the process: configure, environment, file, built-in."""
    layers = (*_configured, *_environment(), BUILT_IN)
    result = Policy(layers)
    _validate(result.orders(), _load(tuple(sorted(result.block.items()))))
    return result


def registry() -> Registry:
    """Return the loaded backends, without the blocked ones."""
    return _load(tuple(sorted(process().block.items())))


@functools.cache
def _load(block: tuple[tuple[str, str], ...]) -> Registry:
    with _lock:
        return _plugins.load(dict(block))


def _environment() -> list[Layer]:
    """Read the HWFUSE_* variables, highest layer first; an unknown one is a warning."""
    for name in os.environ:
        if name.startswith("HWFUSE_") and name not in VARIABLES:
            text = f"{name} is not a variable of hwfuse{suggestion(name, VARIABLES)}"
            warnings.warn(text, HwfuseWarning, stacklevel=2)
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
    with _lock:
        before = list(_configured)
        _configured[:] = layers
        forget()
        try:
            process()
        except Exception:
            _configured[:] = before
            forget()
            raise


def forget() -> None:
    """Drop the process policy and every memo table; the next call decides anew."""
    process.cache_clear()
    _joined.cache_clear()
    for listener in listeners:
        listener()


@functools.cache
def using_policy(
    outer: Policy | None, ops: tuple[tuple[str, tuple[str, ...] | str], ...], origin: str
) -> Policy:
    """Return the layers inside a ``using`` block: one object per content, so that memo keys repeat."""
    entries: dict[str, Entry] = {}
    for op, value in ops:
        _policy.known_op(op, origin)
        entries[op] = Entry(_policy.make_order(value, origin))
    layer = Layer(ops=entries)
    _validate(Policy((layer,)).orders(), registry())
    return Policy((layer, *(outer.layers if outer else ())))


def _validate(orders: Any, loaded: Registry) -> None:
    """Raise for an id whose backend is loaded and has no such provider."""
    known = (*loaded.ids(), *loaded.extra_ids())
    for op, order in orders:
        for identifier in order.named if order is not BUILT_IN.ops["*"].order else ():
            if loaded.unusable(identifier) is None and identifier not in known:
                text = f"{order.origin}: {op}: no provider is called {identifier!r}"
                raise UnknownImplementation(text + suggestion(identifier, known))


def first_use(decision: Decision, key: tuple[Any, ...]) -> None:
    """Keep the decision of the first call of its kind, trace it, and say what was missed."""
    if (decision.op, key) not in decisions:
        decisions[decision.op, key] = decision
        if path := os.environ.get("HWFUSE_TRACE"):
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(decision.to_dict()) + "\n")
    for recorder in recorders:
        recorder.decisions.append(decision)


def announce(key: tuple[str, ...], text: str) -> None:
    """Warn once per process and key."""
    if key not in _announced:
        _announced.add(key)
        warnings.warn(text, HwfuseWarning, stacklevel=5)


def _after_fork() -> None:
    """A child decides anew: devices, plans and caches of the parent are not its own."""
    decisions.clear()
    forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

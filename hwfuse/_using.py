"""Setting the policy from code: `hwfuse.configure` and `hwfuse.using`."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch

from hwfuse import _policy_file, _state
from hwfuse._errors import HwfuseError
from hwfuse._policy import Entry, Layer, Policy


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
        layers = [_policy_file.from_mapping(settings, "hwfuse.configure")]
    else:
        layers = [_policy_file.from_file(Path(settings))]
    _state.install(layers)


def using(*everything: str, **ops: str | list[str]) -> AbstractContextManager[None]:
    """Choose implementations for a block of code, in this thread or task only.

    Args:
        *everything: One id for all ops (a pin), or several (an order).
        **ops: Op name to an id, which pins, or to a list of ids, which is an order.

    Raises:
        ConfigError: An op or id is unknown.
    """
    orders: dict[str, Any] = dict(ops)
    if everything:
        orders["*"] = everything[0] if len(everything) == 1 else everything
    return scope(orders, "hwfuse.using")


def of_one_op(op: Any, ids: tuple[str, ...]) -> Callable[..., Any]:
    """Return *op* with an order of its own: one id pins, several are an order."""
    orders = {op.spec.name: ids[0] if len(ids) == 1 else ids}

    @functools.wraps(op.spec.function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            raise HwfuseError(
                f"{op!r}.using(…) cannot be traced; put hwfuse.using(…) around the compiled call: "
                "it acts on compiled code at once"
            )
        with scope(orders, "op.using"):
            return op(*args, **kwargs)

    return call


@contextmanager
def scope(orders: Mapping[str, Any], origin: str) -> Iterator[None]:
    """Enter a policy for this context only; *orders*: op (or ``*``) to a pin or an order."""
    lists = {op: tuple(ids) if isinstance(ids, list) else ids for op, ids in orders.items()}
    policy = using_policy(_state.context.get(), tuple(sorted(lists.items())), origin)
    token = _state.context.set(policy)
    try:
        yield
    finally:
        _state.context.reset(token)


@functools.cache
def using_policy(outer: Policy | None, ops: tuple[tuple[str, Any], ...], origin: str) -> Policy:
    """Return the layers inside a ``using`` block: one object per content, so memo keys repeat."""
    entries: dict[str, Entry] = {}
    for op, value in ops:
        _policy_file.known_op(op, origin)
        entries[op] = Entry(_policy_file.make_order(value, origin, op))
    layer = Layer(ops=entries)
    _policy_file.validate(Policy((layer,)), _state.registry())
    return Policy((layer, *(outer.layers if outer else ())))

"""Policy: the whole of what the user configured, each value with its origin.

A policy is a stack of layers, highest first: ``op.using``, ``hwfuse.using``, ``hwfuse.configure``,
``HWFUSE_USE``, the file ``$HWFUSE_CONFIG``, built-in.  The first layer that speaks of an op, by
name or by ``*``, decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hwfuse._facts import Fact

REST = "..."
BUILT_IN_ORDER = (
    "cuda/cpp", "cuda/cutlass", "cuda/deepgemm", "cuda/triton", "cuda/cublas",
    "rocm/aiter", "rocm/ck", "rocm/triton", REST,
)  # fmt: skip


@dataclass(frozen=True)
class Order:
    """Ids from most to least preferred.  A pin is one id that must run.

    *origin*: who said so; *op*: the op it was said of, or ``*``.
    """

    ids: tuple[str, ...]
    pin: bool
    origin: str
    op: str = "*"

    @property
    def named(self) -> tuple[str, ...]:
        """The ids, without ``...``."""
        return tuple(identifier for identifier in self.ids if identifier != REST)


@dataclass(frozen=True)
class Rule:
    """An order that applies when every fact holds."""

    when: tuple[Fact, ...]
    order: Order


@dataclass(frozen=True)
class Entry:
    """What one layer says of one op, or of ``*``."""

    order: Order | None = None
    rules: tuple[Rule, ...] = ()


@dataclass(frozen=True)
class Layer:
    """One source of settings.  `on_miss` and each blocked plugin carry their origin."""

    ops: Mapping[str, Entry] = field(default_factory=dict)
    on_miss: tuple[str, str] | None = None
    block: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Policy:
    """Layers, highest first.  Compared by identity: it is part of the memo key of every call."""

    layers: tuple[Layer, ...]

    def order(self, op: str, values: Mapping[str, Any]) -> Order:
        """Return the order that applies to a call of *op* with these values."""
        for entry in self.entries(op):
            for rule in entry.rules:
                if all(fact.holds(values) for fact in rule.when):
                    return rule.order
            if entry.order:
                return entry.order
        raise AssertionError("the built-in layer orders every op")

    def facts(self, op: str) -> Iterator[Fact]:
        """Yield the facts that `order` may look at."""
        for entry in self.entries(op):
            for rule in entry.rules:
                yield from rule.when
            if entry.order:
                return

    def entries(self, op: str) -> Iterator[Entry]:
        """Yield what is said of *op*: layer by layer, by name before ``*``."""
        for layer in self.layers:
            yield from (layer.ops[name] for name in (op, "*") if name in layer.ops)

    @property
    def on_miss(self) -> tuple[str, str]:
        """What happens when a preferred id rejects a call: (word, origin)."""
        return next(layer.on_miss for layer in self.layers if layer.on_miss)

    @property
    def block(self) -> dict[str, str]:
        """Plugins not to load, each with who said so."""
        return {k: v for layer in reversed(self.layers) for k, v in layer.block.items()}


BUILT_IN = Layer(  # names no id: nobody preferred any, so none is missed and no experiment runs
    ops={"*": Entry(Order((REST,), pin=False, origin="built-in"))}, on_miss=("warn", "built-in")
)

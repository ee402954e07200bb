"""Policy: the whole of what the user configured, each value with its origin.

A policy is a stack of layers, highest first: ``op.using``, ``hwfuse.using``, ``hwfuse.configure``,
``HWFUSE_USE``, the file ``$HWFUSE_CONFIG``, built-in.  The first layer that speaks of an op, by
name or by ``*``, decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hwfuse import _facts, _spec
from hwfuse._errors import ConfigError, suggestion
from hwfuse._facts import Fact
from hwfuse._implementation import REFERENCE

REST = "..."
ON_MISS = ("error", "warn", "silent")
BUILT_IN_ORDER = (
    "cuda/cutlass", "cuda/cublas", "cuda/deepgemm", "cuda/triton",
    "rocm/aiter", "rocm/ck", "rocm/triton", REST,
)  # fmt: skip
_VERSION = 1
_KEYS = ("version", "on_miss", "block", "ops")
_OP_KEYS = ("order", "rules")
_RULE_KEYS = ("when", "order")


@dataclass(frozen=True)
class Order:
    """Ids from most to least preferred.  A pin is one id that must run; *origin*: who said so."""

    ids: tuple[str, ...]
    pin: bool
    origin: str

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

    def entry(self, op: str) -> Entry | None:
        """Return what this layer says of *op*: by name, otherwise by ``*``."""
        return self.ops.get(op) or self.ops.get("*")


@dataclass(frozen=True, eq=False)
class Policy:
    """Layers, highest first.  Compared by identity: it is part of the memo key of every call."""

    layers: tuple[Layer, ...]

    def order(self, op: str, values: Mapping[str, Any]) -> Order:
        """Return the order that applies to a call of *op* with these values."""
        for layer in self.layers:
            entry = layer.entry(op)
            for rule in entry.rules if entry else ():
                if all(fact.holds(values) for fact in rule.when):
                    return rule.order
            if entry and entry.order:
                return entry.order
        raise AssertionError("the built-in layer orders every op")

    def facts(self, op: str) -> Iterator[Fact]:
        """Yield the facts that `order` may look at."""
        for layer in self.layers:
            entry = layer.entry(op)
            for rule in entry.rules if entry else ():
                yield from rule.when
            if entry and entry.order:
                return

    @property
    def on_miss(self) -> tuple[str, str]:
        """What happens when a preferred id rejects a call: (word, origin)."""
        return next(layer.on_miss for layer in self.layers if layer.on_miss)

    @property
    def block(self) -> dict[str, str]:
        """Plugins not to load, each with who said so."""
        return {k: v for layer in reversed(self.layers) for k, v in layer.block.items()}

    def orders(self) -> Iterator[tuple[str, Order]]:
        """Yield every (op, order) of every layer, for validation and for `hwfuse config`."""
        for layer in self.layers:
            for op, entry in layer.ops.items():
                if entry.order:
                    yield op, entry.order
                for rule in entry.rules:
                    yield op, rule.order


BUILT_IN = Layer(
    ops={"*": Entry(Order(BUILT_IN_ORDER, pin=False, origin="built-in"))},
    on_miss=("warn", "built-in"),
)


def make_order(value: object, origin: str) -> Order:
    """Turn a string (a pin) or a list of ids into an order; ConfigError names *origin*."""
    if isinstance(value, str):
        return Order((_identifier(value, origin),), pin=True, origin=origin)
    if not isinstance(value, list | tuple) or not value:
        raise ConfigError(f"{origin}: found {value!r}, needs an id or a list of ids")
    ids = tuple(v if v == REST else _identifier(v, origin) for v in value)
    if len(set(ids)) != len(ids):
        raise ConfigError(f"{origin}: an id is listed twice in {list(ids)}")
    if REST in ids[:-1]:
        raise ConfigError(f"{origin}: {REST!r} can only be the last item of {list(ids)}")
    return Order(ids, pin=False, origin=origin)


def _identifier(value: object, origin: str) -> str:
    parts = value.split("/") if isinstance(value, str) else []
    if len(parts) != 2 or not all(parts):  # noqa: PLR2004
        raise ConfigError(f"{origin}: {value!r} is not an id; needs backend/provider: {REFERENCE}")
    return str(value)


def from_use(text: str, origin: str) -> Layer:
    """Parse ``op=id,*=id``: the value of HWFUSE_USE."""
    ops: dict[str, Entry] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        op, equals, identifier = item.partition("=")
        if not equals or op in ops:
            raise ConfigError(f"{origin}: found {item!r}, needs op=id once per op, or *=id")
        known_op(op, origin)
        ops[op] = Entry(make_order(identifier, origin))
    return Layer(ops=ops)


def known_op(op: str, origin: str) -> None:
    """Raise ConfigError unless *op* is ``*`` or the name of an op."""
    if op != "*" and op not in _spec.names():
        raise ConfigError(f"{origin}: no op is called {op!r}{suggestion(op, _spec.names())}")


def from_file(path: Path) -> Layer:
    """Read a YAML policy; every value remembers its line."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    return from_yaml(text, str(path))


def from_yaml(text: str, name: str) -> Layer:
    """Parse YAML text called *name*."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not YAML: {error}") from error
    if root is None:
        return Layer()
    return _layer(_plain(root, name), name)


def from_mapping(data: Mapping[str, Any], origin: str) -> Layer:
    """Turn a mapping of the same shape as the YAML into a layer."""
    return _layer(_Located(dict(data), {}, origin), origin)


class _Located(dict[str, Any]):
    """A mapping that knows where each key's value was written."""

    def __init__(self, data: dict[str, Any], lines: dict[str, str], origin: str) -> None:
        super().__init__(data)
        self.lines, self.origin = lines, origin

    def where(self, key: str) -> str:
        return self.lines.get(key, self.origin)


def _plain(node: yaml.Node, name: str) -> Any:
    """Turn a composed node into plain values; mappings keep their lines, repeated keys raise."""
    if isinstance(node, yaml.MappingNode):
        data: dict[str, Any] = {}
        lines: dict[str, str] = {}
        for key_node, value_node in node.value:
            key, where = str(key_node.value), f"{name}:{key_node.start_mark.line + 1}"
            if key in data:
                raise ConfigError(f"{where}: {key!r} is already set at {lines[key]}")
            data[key], lines[key] = _plain(value_node, name), where
        return _Located(data, lines, f"{name}:{node.start_mark.line + 1}")
    if isinstance(node, yaml.SequenceNode):
        return [_plain(child, name) for child in node.value]
    return _scalar(node)


def _scalar(node: yaml.Node) -> Any:
    loader = yaml.SafeLoader("")
    return loader.construct_object(node)  # type: ignore[no-untyped-call]


def _layer(data: Any, name: str) -> Layer:
    root = _mapping(data, name, _KEYS)
    if root.get("version", _VERSION) != _VERSION:
        raise ConfigError(f"{root.where('version')}: version is {root['version']!r}, needs 1")
    on_miss = root.get("on_miss")
    if on_miss is not None and on_miss not in ON_MISS:
        raise ConfigError(f"{root.where('on_miss')}: on_miss is {on_miss!r}, needs one of {ON_MISS}")
    block = root.get("block") or []
    if not isinstance(block, list | tuple):
        raise ConfigError(f"{root.where('block')}: block is {block!r}, needs a list of plugins")
    ops = _mapping(root.get("ops") or {}, root.where("ops"), None)
    return Layer(
        ops={op: _entry(op, value, ops.where(op)) for op, value in ops.items()},
        on_miss=(on_miss, root.where("on_miss")) if on_miss else None,
        block={str(plugin): root.where("block") for plugin in block},
    )


def _entry(op: str, value: Any, origin: str) -> Entry:
    known_op(op, origin)
    if not isinstance(value, Mapping):
        return Entry(make_order(value, origin))
    data = _mapping(value, origin, _OP_KEYS)
    order = make_order(data["order"], data.where("order")) if "order" in data else None
    rules = [_rule(op, rule, data.where("rules")) for rule in data.get("rules") or []]
    return Entry(order, tuple(rules))


def _rule(op: str, value: Any, origin: str) -> Rule:
    data = _mapping(value, origin, _RULE_KEYS)
    if "when" not in data or "order" not in data:
        raise ConfigError(f"{data.origin}: a rule needs both when and order")
    when = data["when"] if isinstance(data["when"], list) else [data["when"]]
    words = frozenset() if op == "*" else _spec.load(op).vocabulary
    try:
        facts = tuple(_facts.parse(text) for text in when)
        for fact in facts:
            _facts.check_names(fact, words)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{data.where('when')}: {error}") from None
    return Rule(facts, make_order(data["order"], data.where("order")))


def _mapping(value: Any, origin: str, known: tuple[str, ...] | None) -> _Located:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{origin}: found {value!r}, needs a mapping")
    located = value if isinstance(value, _Located) else _Located(dict(value), {}, origin)
    for key in located:
        if known is not None and key not in known:
            raise ConfigError(f"{located.where(key)}: unknown key {key!r}{suggestion(key, known)}")
    return located

"""Reading settings: the YAML file, a mapping of its shape, the HWFUSE_* variables.

Not loaded while nothing is set.

The file is composed into nodes, so every value remembers its line and a repeated key is an error.
It names implementations, never modules to import.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from hwfuse import _fact_parser, _spec
from hwfuse._errors import ConfigError, UnknownImplementation, suggestion
from hwfuse._implementation import REFERENCE
from hwfuse._plugins import Registry
from hwfuse._policy import REST, Entry, Layer, Order, Policy, Rule
from hwfuse._report import announce

VARIABLES = (
    "HWFUSE_USE", "HWFUSE_CONFIG", "HWFUSE_BLOCK", "HWFUSE_TRACE",
    "HWFUSE_LAUNCH", "HWFUSE_CHECK_LAUNCH",  # read by hwfuse_triton
)  # fmt: skip

ON_MISS = ("error", "warn", "silent")
_VERSION = 1
_KEYS = ("version", "on_miss", "block", "ops")
_OP_KEYS = ("order", "rules")
_RULE_KEYS = ("when", "order")


def environment() -> list[Layer]:
    """Read the HWFUSE_* variables, highest layer first; an unknown one is a warning."""
    for name in os.environ:
        if name.startswith("HWFUSE_") and name not in VARIABLES:
            text = f"{name} is not a variable of hwfuse{suggestion(name, VARIABLES)}"
            announce((name,), text)
    layers = []
    if use := os.environ.get("HWFUSE_USE"):
        layers.append(from_use(use, "HWFUSE_USE"))
    if block := os.environ.get("HWFUSE_BLOCK"):
        names = [name.strip() for name in block.split(",") if name.strip()]
        layers.append(Layer(block=dict.fromkeys(names, "HWFUSE_BLOCK")))
    if path := os.environ.get("HWFUSE_CONFIG"):
        layers.append(from_file(Path(path)))
    return layers


def orders(policy: Policy) -> Iterator[Order]:
    """Yield every order of every layer, for validation and for `hwfuse config`."""
    for layer in policy.layers:
        for entry in layer.ops.values():
            if entry.order:
                yield entry.order
            for rule in entry.rules:
                yield rule.order


def validate(policy: Policy, loaded: Registry) -> None:
    """Raise for an id whose backend is loaded and has no such provider."""
    known = (*loaded.ids(), *loaded.extra_ids())
    for order in orders(policy):
        for identifier in order.named:
            if loaded.unusable(identifier) is None and identifier not in known:
                text = f"{order.origin}: {order.op}: no provider is called {identifier!r}"
                raise UnknownImplementation(text + suggestion(identifier, known))


def make_order(value: object, origin: str, op: str) -> Order:
    """Turn a string (a pin) or a list of ids into an order; ConfigError names *origin*."""
    if isinstance(value, str):
        return Order((_identifier(value, origin),), pin=True, origin=origin, op=op)
    if not isinstance(value, list | tuple) or not value:
        raise ConfigError(f"{origin}: found {value!r}, needs an id or a list of ids")
    ids = tuple(REST if v in (REST, ...) else _identifier(v, origin) for v in value)
    if len(set(ids)) != len(ids):
        raise ConfigError(f"{origin}: an id is listed twice in {list(ids)}")
    if REST in ids[:-1]:
        raise ConfigError(f"{origin}: {REST!r} can only be the last item of {list(ids)}")
    return Order(ids, pin=False, origin=origin, op=op)


def _identifier(value: object, origin: str) -> str:
    parts = value.split("/") if isinstance(value, str) else []
    if len(parts) != 2 or not all(parts):
        raise ConfigError(f"{origin}: {value!r} is not an id; needs backend/provider: {REFERENCE}")
    return str(value)


def from_use(text: str, origin: str) -> Layer:
    """Parse ``op=id,*=id``: the value of HWFUSE_USE."""
    ops: dict[str, Entry] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        op, equals, identifier = map(str.strip, item.partition("="))
        if not equals or op in ops:
            raise ConfigError(f"{origin}: found {item!r}, needs op=id once per op, or *=id")
        known_op(op, origin)
        ops[op] = Entry(make_order(identifier, origin, op))
    return Layer(ops=ops)


def known_op(op: str, origin: str) -> None:
    """Raise ConfigError unless *op* is ``*`` or the name of an op."""
    if op != "*" and op not in _spec.names():
        raise ConfigError(f"{origin}: no op is called {op!r}{suggestion(op, _spec.names())}")


def from_file(path: Path) -> Layer:
    """Read a YAML policy; every value remembers its line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
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
    try:
        return yaml.SafeLoader("").construct_object(node)
    except (yaml.YAMLError, ValueError) as error:  # a tag of another language, a 31st of February
        raise ConfigError(f"{name}:{node.start_mark.line + 1}: {error}") from error


def _layer(data: Any, name: str) -> Layer:
    root = _mapping(data, name, _KEYS)
    if root.get("version", _VERSION) != _VERSION:
        raise ConfigError(f"{root.where('version')}: version is {root['version']!r}, needs 1")
    on_miss = root.get("on_miss")
    if on_miss is not None and on_miss not in ON_MISS:
        raise ConfigError(
            f"{root.where('on_miss')}: on_miss is {on_miss!r}, needs one of {ON_MISS}"
        )
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
        return Entry(make_order(value, origin, op))
    data = _mapping(value, origin, _OP_KEYS)
    order = make_order(data["order"], data.where("order"), op) if "order" in data else None
    where, rules = data.where("rules"), data.get("rules", [])
    if not isinstance(rules, list | tuple):
        raise ConfigError(f"{where}: rules is {rules!r}, needs a list of mappings")
    return Entry(order, tuple(_rule(op, rule, where) for rule in rules))


def _rule(op: str, value: Any, origin: str) -> Rule:
    data = _mapping(value, origin, _RULE_KEYS)
    if "when" not in data or "order" not in data:
        raise ConfigError(f"{data.origin}: a rule needs both when and order")
    when = data["when"] if isinstance(data["when"], list) else [data["when"]]
    words = frozenset() if op == "*" else _spec.load(op).vocabulary
    try:
        facts = tuple(_fact_parser.parse(text) for text in when)
        for fact in facts:
            _fact_parser.check_names(fact, words)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{data.where('when')}: {error}") from None
    return Rule(facts, make_order(data["order"], data.where("order"), op))


def _mapping(value: Any, origin: str, known: tuple[str, ...] | None) -> _Located:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{origin}: found {value!r}, needs a mapping")
    located = value if isinstance(value, _Located) else _Located(dict(value), {}, origin)
    for key in located:
        if known is not None and key not in known:
            raise ConfigError(f"{located.where(key)}: unknown key {key!r}{suggestion(key, known)}")
    return located

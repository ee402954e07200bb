"""How facts enter the memo key: as text that the guard is generated from."""

from __future__ import annotations

import ast
from collections.abc import Collection

from hwfuse import _fact_parser
from hwfuse._facts import DEVICE_NAMES, Fact
from hwfuse._spec import Spec


def key_parts(spec: Spec, facts: Collection[Fact]) -> tuple[set[str], list[str]]:
    """Return the statements that hoist shapes and strides, and the expressions of the memo key."""
    hoisted: set[str] = set()
    parts: list[str] = []
    for fact in sorted(facts, key=lambda fact: fact.source):
        if fact.names <= DEVICE_NAMES:
            continue  # decided by the device, which is in the key
        inline = _Inline(spec)
        text = ast.unparse(inline.visit(_fact_parser.quoted(fact.tree)))
        hoisted |= inline.hoisted
        # Device words are not in the guard's reach; with dtypes and options alone the key decides.
        derived = inline.derived or (inline.of_device and not inline.simple)
        parts += sorted(inline.reads) if inline.simple or derived else [text]
        if derived:  # all that `sizes` can compute from goes into the key
            hoisted |= {f"{tensor}_shape = {tensor}.shape" for tensor in spec.tensors}
            parts += [f"{tensor}_shape" for tensor in spec.tensors]
            parts += [name for name in spec.parameters if name not in spec.tensors]
    return hoisted, parts


class _Inline(ast.NodeTransformer):
    """Rewrites a fact to read hoisted shapes and strides: ``m`` becomes ``x_shape[0]``.

    `reads`: every expression it looks at.  `simple`: these are dtypes and options only.
    `derived`: it needs a size that is no dimension of a tensor.  `of_device`: it speaks of arch or
    vendor.
    """

    def __init__(self, spec: Spec) -> None:
        self.spec, self.simple, self.derived, self.of_device = spec, True, False, False
        self.reads, self.hoisted = set[str](), set[str]()
        self.dimensions = {
            name: (tensor, index)
            for tensor, names in reversed(list(spec.dims.items()))
            for index, name in enumerate(names)
        }

    def visit_Name(self, node: ast.Name) -> ast.expr:
        name = node.id
        if name in self.dimensions:
            tensor, index = self.dimensions[name]
            return self._hoist(tensor, "shape", f"[{index}]")
        if name in self.spec.size_names or name in DEVICE_NAMES:
            self.derived |= name not in DEVICE_NAMES
            self.of_device |= name in DEVICE_NAMES
            return node
        return self._read(name) if name in self.spec.parameters else node

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        if node.attr == "shape":
            return self._hoist(ast.unparse(node.value), "shape", "")
        self.simple = self.simple and node.attr == "dtype"
        return self._read(ast.unparse(node))

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.simple = False
        arguments = [ast.unparse(argument) for argument in node.args]
        match node.func:
            case ast.Name(id="aligned"):
                return self._read(f"{arguments[0]}.data_ptr() % {arguments[1]} == 0")
            case ast.Attribute(value=ast.Name(id=tensor), attr="stride"):
                return self._hoist(tensor, "stride", f"[{arguments[0]}]" if arguments else "")
        return self._read(ast.unparse(node))

    def _hoist(self, tensor: str, what: str, index: str) -> ast.expr:
        self.simple = False
        self.hoisted.add(f"{tensor}_{what} = {tensor}.{what}{'()' if what == 'stride' else ''}")
        return self._read(f"{tensor}_{what}{index}")

    def _read(self, text: str) -> ast.expr:
        self.reads.add(text)
        return ast.parse(text, mode="eval").body

"""The language of facts: text in, `Fact` out.  Not loaded while nothing declares a fact."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable, Iterator
from types import CodeType

from hwfuse._errors import suggestion
from hwfuse._facts import ARCH, DEVICE_NAMES, DTYPES, PREDICATES, Fact

_ATTRIBUTES = {"dtype", "ndim", "shape", "requires_grad"}
_METHODS = {"stride": 1, "is_contiguous": 0, "numel": 0}  # to the most arguments they take


@functools.cache
def parse(source: str) -> Fact:
    """Parse one fact; ValueError says what the language does not have."""
    try:
        tree = ast.parse(source, mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"{source!r} is not a fact: {error.msg}") from None
    statement = tree.operand if isinstance(tree, ast.UnaryOp) else tree
    is_predicate = isinstance(statement, ast.Call) and isinstance(statement.func, ast.Name)
    is_method = isinstance(statement, ast.Call) and isinstance(statement.func, ast.Attribute)
    if not (isinstance(statement, ast.Compare) or is_predicate or is_method):
        raise ValueError(f"{source!r} is not a fact: needs a comparison, such as m <= 64")
    return Fact(source, frozenset(read_by(tree, source)), tree, compile_expression(tree))


def check_names(fact: Fact, known: Iterable[str]) -> None:
    """Raise ValueError for a name that is neither an argument, a size nor a device word."""
    known = {*known, *DEVICE_NAMES}
    for name in sorted(fact.names - known):
        raise ValueError(f"{fact.source!r}: unknown name {name!r}{suggestion(name, known)}")


def thresholds(fact: Fact) -> Iterator[tuple[str, int]]:
    """Yield (size, number) for each ``size <compare> number``: where the parity harness looks."""
    if isinstance(fact.tree, ast.Compare) and len(fact.tree.comparators) == 1:
        left, right = fact.tree.left, fact.tree.comparators[0]
        if isinstance(left, ast.Name) and _is_number(right):
            yield left.id, ast.literal_eval(right)


def read_by(node: ast.expr, source: str) -> Iterator[str]:  # noqa: C901, PLR0912 - a case a form
    """Yield what an expression reads; refuse whatever the language does not have.

    A policy file comes from anywhere, so nothing may pass that could call or reach other objects:
    an index or a further argument is a constant.
    """
    match node:
        case ast.Constant():
            return
        case ast.Name(id=name):
            if name not in DTYPES and ARCH.fullmatch(name) is None:
                yield name
        case ast.Compare(left=left, comparators=rest):
            for child in (left, *rest):
                yield from read_by(child, source)
        case (
            ast.BinOp(left=left, right=right, op=ast.Add() | ast.Sub() | ast.Mult())
            | ast.BinOp(left=left, right=right, op=ast.Mod() | ast.FloorDiv())
        ):
            yield from read_by(left, source)
            yield from read_by(right, source)
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=child):
            yield from read_by(child, source)
        case ast.Tuple(elts=children) | ast.List(elts=children):
            for child in children:
                yield from read_by(child, source)
        case ast.Attribute(value=ast.Name(id=name), attr="dtype"):
            yield f"{name}.dtype"
        case ast.Attribute(value=ast.Name(id=name), attr=attribute) if attribute in _ATTRIBUTES:
            yield name
        case ast.Subscript(value=ast.Attribute(attr="shape") as value, slice=index) if _is_number(
            index
        ):
            yield from read_by(value, source)
        case ast.Call(
            func=ast.Attribute(value=ast.Name(id=name), attr=method), args=rest, keywords=[]
        ) if len(rest) <= _METHODS.get(method, -1) and all(map(_is_number, rest)):
            yield name
        case ast.Call(
            func=ast.Name(id=predicate), args=[ast.Name(id=name), ast.Constant()], keywords=[]
        ) if predicate in PREDICATES:
            yield name
        case _:
            text = ast.unparse(node)
            raise ValueError(f"{source!r} is not a fact: {text!r} is not part of the language")


def _is_number(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node = node.operand
    return isinstance(node, ast.Constant) and type(node.value) is int


class _Quote(ast.NodeTransformer):
    """Turns the bare words sm90, gfx942 into strings."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(node.id) if ARCH.fullmatch(node.id) else node


def quoted(tree: ast.expr) -> ast.expr:
    """Return a copy of the expression in plain Python, arch words as strings."""
    copy: ast.expr = _Quote().visit(ast.parse(ast.unparse(tree), mode="eval").body)
    return ast.fix_missing_locations(copy)


def compile_expression(tree: ast.expr) -> CodeType:
    """Compile a fact or a part of one."""
    return compile(ast.Expression(quoted(tree)), "<fact>", "eval")

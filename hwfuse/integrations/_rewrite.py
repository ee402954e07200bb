"""Replace an exact run of statements in a class's own method, on a subclass made for it.

Nothing here knows transformers.  The class's text is read, the statements of a rule are found by
their syntax tree (so comments and line breaks do not matter), and the rest of the method stays as
its authors wrote it.  Text that has changed is an error, never a guess.
"""

from __future__ import annotations
import __future__

import ast
import difflib
import functools
import inspect
import linecache
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from hwfuse._errors import IntegrationError


class SourceChanged(IntegrationError):
    """A class that a rule is written for no longer has the text that the rule replaces."""


@dataclass(frozen=True)
class Edit:
    """Statements that must stand next to each other exactly once, and what takes their place."""

    expected: str
    replacement: str


@dataclass(frozen=True)
class Tail:
    """What another class's `forward` does after the edited statements, as a static method.

    Attributes:
        name: of the method; its arguments are those of `forward`.
        owner: name of the class, in the module of the rewritten one.
        edit: the change to the text of the owner's `forward`, whose class stays as it is.
    """

    name: str
    owner: str
    edit: Edit


@dataclass(frozen=True)
class Use:
    """What one rewritten instance does.

    Attributes:
        mode: in words, for the report.
        calls: each op that it calls, and the call's sizes as keywords of its `make_inputs`.
    """

    mode: str
    calls: tuple[tuple[str, dict[str, Any]], ...] = ()


def _never(_module: Any) -> None:
    """Object to nothing."""


def _nothing(_module: Any) -> dict[str, Sequence[Any]]:
    """Pack nothing."""
    return {}


@dataclass(frozen=True)
class Rule:
    """How one family of classes is rewritten.

    Attributes:
        name, version: what the report shows; the version goes up when the rule's text changes.
        classes: names of the classes it is written for; a class matches by any name in its MRO.
        ops: what rewritten instances may call.
        edits: changes to the text of `forward`.
        methods: added to the subclass, for the replacement to call.
        use: what an instance does under a value of `patch`'s argument *pack*.
        tails: more methods, made of the text of other classes.
        objection: looks at one instance and says why it cannot be rewritten, or None.  It covers
            what the edits take for granted and the text of `forward` does not show.
        packs: linears of an instance that can be one GEMM, by the attribute that holds it.
        needs_packs: whether a class whose linears cannot be packed is better left alone.
    """

    name: str
    version: int
    classes: tuple[str, ...]
    ops: tuple[str, ...]
    edits: tuple[Edit, ...]
    methods: tuple[Callable[..., Any], ...]
    use: Callable[[Any, str], Use]
    tails: tuple[Tail, ...] = ()
    objection: Callable[[Any], str | None] = _never
    packs: Callable[[Any], Mapping[str, Sequence[Any]]] = _nothing
    needs_packs: bool = False

    def __str__(self) -> str:
        return f"{self.name} v{self.version}"


def rewritten_class(cls: Any, rule: Rule) -> type:
    """Return the subclass of `cls` with the rule's edits; one object for one text and rule.

    It keeps the class's name and module: models match on them when they record outputs, place
    layers on devices and print themselves.

    Raises:
        SourceChanged: the text is not what the rule expects, or cannot be read.
    """
    scope = getattr(inspect.unwrap(cls.forward), "__globals__", {})
    owners = (scope.get(tail.owner) for tail in rule.tails)
    return _rewritten_class(cls, rule, cls.forward, *(getattr(o, "forward", o) for o in owners))


@functools.cache
def _rewritten_class(cls: Any, rule: Rule, forward: Any, *others: Any) -> type:
    tails = {
        tail.name: staticmethod(_rewritten_method(tail.owner, other, rule, (tail.edit,)))
        for tail, other in zip(rule.tails, others, strict=True)
    }
    members: dict[str, Any] = {method.__name__: method for method in rule.methods} | {
        **tails,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": _reduce_as_rewritten,
        "_hwfuse_rule": rule,
        "_hwfuse_stock": cls,
        "forward": _rewritten_method(cls.__qualname__, forward, rule, rule.edits),
    }
    return type(cls.__name__, (cls,), members)


def rule_of(module: object) -> Rule | None:
    """Return the rule that rewrote this object's class, or None for a stock class."""
    return getattr(type(module), "_hwfuse_rule", None)


def stock_class(cls: type) -> type | None:
    """Return what a rewritten class was made from; None if it is not itself a rewritten class."""
    return vars(cls).get("_hwfuse_stock")


def _reduce_as_rewritten(self: Any, protocol: Any) -> tuple[Any, ...]:
    """Copy and pickle by the stock class and the rule: the subclass has no importable name."""
    stock, rule = self._hwfuse_stock, self._hwfuse_rule
    _, _, *state = stock.__reduce_ex__(self, protocol)
    return (_new_rewritten, (stock, rule), *state)


def _new_rewritten(stock: type, rule: Rule) -> object:
    cls: Any = rewritten_class(stock, rule)
    made: object = cls.__new__(cls)
    return made


def _rewritten_method(owner: str, method: Any, rule: Rule, edits: tuple[Edit, ...]) -> Any:
    """Compile the edited text in the method's own module, decorators included."""
    wrappers = 0
    while hasattr(method, "__wrapped__"):
        method, wrappers = method.__wrapped__, wrappers + 1
    where = f"{owner}.forward"
    if not isinstance(method, FunctionType) or method.__name__ == "<lambda>":
        raise SourceChanged(f"{where}: rule {rule} needs a def, found {method!r}")
    code = method.__code__
    try:
        lines, first = inspect.getsourcelines(method)
    except OSError as error:
        raise SourceChanged(f"{where}: rule {rule} needs the source text: {error}") from error
    where += f" ({code.co_filename}:{first})"
    if code.co_freevars:
        raise SourceChanged(f"{where}: rule {rule} cannot move uses of {code.co_freevars}")
    if wrappers > len(_definition(_parse(lines)).decorator_list):
        raise SourceChanged(f"{where}: wrapped after its class was made, which {rule} would undo")
    for edit in edits:
        lines = _edited(lines, edit, f"{where}: rule {rule}")

    # The model's file name and line numbers stay, so a traceback points into the model's code.
    filename = f"<hwfuse {rule}, {owner}: {code.co_filename}>"
    module = _parse(lines)
    ast.increment_lineno(module, first - 2)
    text = ["\n"] * (first - 1) + lines
    linecache.cache[filename] = (sum(map(len, text)), None, text, filename)
    flags = code.co_flags & __future__.annotations.compiler_flag
    tree = ast.Module([_definition(module)], [])
    compiled = compile(tree, filename, "exec", flags, dont_inherit=True)
    made: dict[str, Any] = {}
    exec(compiled, method.__globals__, made)  # noqa: S102 - the model's own text and our edits
    return made[method.__name__]


def _parse(lines: list[str]) -> ast.Module:
    """Parse a function, indented or not; its first line becomes line 2."""
    return ast.parse(("if True:\n" if lines[0][0].isspace() else "\n") + "".join(lines))


def _definition(module: ast.Module) -> ast.FunctionDef:
    return next(node for node in ast.walk(module) if isinstance(node, ast.FunctionDef))


def _edited(lines: list[str], edit: Edit, where: str) -> list[str]:
    """Return the method's lines with one edit made."""
    expected = _texts(ast.parse(edit.expected).body)
    function = _definition(_parse(lines))
    found = [
        (body, start)
        for body in _statement_lists(function)
        for start in range(len(body))
        if _texts(body[start : start + len(expected)]) == expected
    ]
    if len(found) != 1:
        raise SourceChanged(_difference(function, expected, len(found), where))
    ((body, start),) = found
    run, rest = body[start : start + len(expected)], body[start + len(expected) :]
    _check_dropped_names(run, ast.parse(edit.replacement).body, rest, where)

    begin, end = run[0].lineno - 2, (run[-1].end_lineno or 0) - 1
    replacement = edit.replacement.strip("\n") + "\n"
    new = textwrap.indent(replacement, " " * run[0].col_offset).splitlines(keepends=True)
    new += ["\n"] * (end - begin - len(new))  # the lines below keep their numbers
    return lines[:begin] + new + lines[end:]


def _statement_lists(function: ast.FunctionDef) -> Iterator[list[ast.stmt]]:
    for node in ast.walk(function):
        for field in ("body", "orelse", "finalbody"):
            body = getattr(node, field, None)
            if isinstance(body, list):
                yield body


def _texts(statements: list[ast.stmt]) -> list[str]:
    return [ast.unparse(statement) for statement in statements]


def _check_dropped_names(
    run: list[ast.stmt], replacement: list[ast.stmt], rest: list[ast.stmt], where: str
) -> None:
    """Refuse when a name that only the replaced statements set is read further down."""
    for name in sorted(_names(run, ast.Store) - _names(replacement, ast.Store)):
        user = next((s for s in rest if name in _names([s], ast.Load, ast.Store)), None)
        if user is not None and name in _names([user], ast.Load):
            text = ast.unparse(user).splitlines()[0]
            raise SourceChanged(f"{where} would leave {name} unset, which is read in: {text}")


def _names(statements: list[ast.stmt], *contexts: type[ast.expr_context]) -> set[str]:
    """Return the variables that statements read or set, without those inside comprehensions."""
    nodes = [node for statement in statements for node in ast.walk(statement)]
    names = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, contexts)}
    targets = [node.target for node in nodes if isinstance(node, ast.comprehension)]
    return names - {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}


def _difference(function: ast.FunctionDef, expected: list[str], count: int, where: str) -> str:
    """Say what was expected and show the most similar statements that the class has."""
    if count > 1:
        listing = textwrap.indent("\n".join(expected), "  ")
        return f"{where} expects these statements once and found them {count} times:\n{listing}"
    windows = [
        _texts(body[start : start + len(expected)])
        for body in _statement_lists(function)
        for start in range(max(1, len(body) - len(expected) + 1))
    ]
    wanted = "\n".join(expected)
    closest = max(
        windows, key=lambda w: difflib.SequenceMatcher(None, wanted, "\n".join(w)).ratio()
    )
    names = ("expected by the rule", "found in the class")
    diff = difflib.unified_diff(expected, closest, *names, lineterm="", n=len(expected))
    listing = textwrap.indent("\n".join(diff), "  ")
    return f"{where} expects statements that the class does not have; closest:\n{listing}"

"""Implementations: files that are data until one of them is chosen.

The core reads ``REQUIRES``, ``COPIES`` and the signature with `ast`; only `Implementation.load`
imports the file.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hwfuse import _facts
from hwfuse._errors import BrokenImplementation, suggestion
from hwfuse._facts import Fact
from hwfuse._spec import Spec

REFERENCE = "reference/torch"
_TRAITS = ("differentiable", "experimental", "deterministic", "batch_invariant")
_KEYS = ("arch", "packages", "facts", *_TRAITS)


@dataclass(frozen=True)
class Requires:
    """What an implementation declares about itself.  Empty `arch`: every arch of its vendor."""

    arch: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    facts: tuple[Fact, ...] = ()
    differentiable: bool = False
    experimental: bool = False
    deterministic: bool = False
    batch_invariant: bool = False


@dataclass(eq=False)
class Implementation:
    """One callable for one op.  `problem` says why it can never run, e.g. another signature."""

    id: str
    op: str
    vendor: str | None
    module: str
    path: Path | None
    requires: Requires = field(default_factory=Requires)
    copies: Mapping[str, str] = field(default_factory=dict)
    problem: str | None = field(default_factory=lambda: None)
    function: Callable[..., Any] | None = None

    @property
    def backend(self) -> str:
        """The part of the id before the slash."""
        return self.id.partition("/")[0]

    @property
    def provider(self) -> str:
        """The part of the id after the slash."""
        return self.id.partition("/")[2]

    def load(self) -> Callable[..., Any]:
        """Return the callable, importing its file the first time."""
        if self.function is None:
            try:
                self.function = getattr(importlib.import_module(self.module), self.op)
            except Exception as error:
                text = (
                    f"{self.id} was chosen for {self.op} but {self.path} cannot be used: {error!r}"
                )
                raise BrokenImplementation(text) from error
        return self.function


class InFile(Implementation):
    """An implementation whose file is read when its declarations are first asked for.

    So on one vendor's device the files of the others stay closed.
    """

    def __init__(self, path: Path, spec: Spec, packages: tuple[str, ...], **identity: Any) -> None:
        super().__init__(op=spec.name, path=path, **identity)
        del self.requires, self.copies, self.problem
        self._source = path, spec, packages

    def __getattr__(self, name: str) -> Any:
        if name not in ("requires", "copies", "problem"):
            raise AttributeError(name)
        self.requires, self.copies, self.problem = _read(*self._source)
        return self.__dict__[name]


def _read(path: Path, spec: Spec, packages: tuple[str, ...]) -> tuple[Requires, Any, str | None]:
    """Return requires, copies and problem of a file, without importing it."""
    requires, copies, problem = Requires(), dict[str, str](), None
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        requires = parse_requires(_literal(tree, "REQUIRES"), spec, packages)
        copies = _literal(tree, "COPIES")
        _check_signature(tree, spec)
    except (OSError, SyntaxError, ValueError) as error:
        problem = f"{path}: {error}"
    return requires, copies, problem


def parse_requires(data: Mapping[str, Any], spec: Spec, packages: tuple[str, ...] = ()) -> Requires:
    """Turn a REQUIRES mapping into a record; ValueError for an unknown key, name or form."""
    for key in data:
        if key not in _KEYS:
            raise ValueError(f"REQUIRES has no key {key!r}{suggestion(key, _KEYS)}")
    for key in ("arch", "packages", "facts"):
        check_strings(f"REQUIRES[{key!r}]", data.get(key, ()))
    _check_values(data)
    facts: tuple[Fact, ...] = ()
    if data.get("facts"):
        from hwfuse import _fact_parser

        facts = tuple(_fact_parser.parse(text) for text in data["facts"])
        for fact in facts:
            _fact_parser.check_names(fact, spec.vocabulary)
    return Requires(
        arch=tuple(data.get("arch", ())),
        packages=(*packages, *data.get("packages", ())),
        facts=facts,
        **{trait: data.get(trait, False) for trait in _TRAITS},
    )


def _check_values(data: Mapping[str, Any]) -> None:
    for trait in _TRAITS:
        if not isinstance(data.get(trait, False), bool):
            raise ValueError(f"REQUIRES[{trait!r}] is {data[trait]!r}, needs a bool")  # noqa: TRY004
    for arch in data.get("arch", ()):
        if arch.startswith(("sm", "gfx")) and not _facts.ARCH.fullmatch(arch):
            raise ValueError(f"{arch!r} is not an arch; write sm90 or gfx942")
    for requirement in data.get("packages", ()):
        parse_requirement(requirement)


def check_strings(what: str, value: object) -> None:
    """Raise ValueError unless *value* is a tuple or list of strings; one string is not."""
    if not isinstance(value, tuple | list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{what} is {value!r}, needs a tuple of strings")


def _literal(tree: ast.Module, name: str) -> dict[str, Any]:
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                try:
                    value = ast.literal_eval(node.value)
                except (TypeError, ValueError):
                    value = ast.unparse(node.value)
                if not isinstance(value, dict):
                    raise ValueError(f"{name} is {value!r}, needs a literal dict")
                return value
    if name == "REQUIRES":
        raise ValueError("no REQUIRES = {...}")
    return {}


def _check_signature(tree: ast.Module, spec: Spec) -> None:
    """Raise ValueError, both signatures shown, unless the file's function has the spec's."""
    found = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == spec.name]
    if not found:
        raise ValueError(f"no function {spec.name}")
    source = ast.parse(inspect.getsource(spec.function)).body[0]
    assert isinstance(source, ast.FunctionDef)
    needed, has = _signature(source), _signature(found[0])
    if needed != has:
        raise ValueError(f"signatures differ\n  spec: {needed}\n  file: {has}")


def _signature(function: ast.FunctionDef) -> str:
    returns = "" if function.returns is None else f" -> {ast.unparse(function.returns)}"
    text = f"{function.name}({ast.unparse(function.args)}){returns}"
    return re.sub(r"\b(torch|typing)\.(?=[A-Za-z])", "", text)


def parse_requirement(requirement: str) -> tuple[str, str | None]:
    """Split ``triton>=3.6`` or ``triton`` into name and least version."""
    match = re.fullmatch(r"([\w.-]+?)(?:>=([\d.]+))?", requirement)
    if match is None:
        raise ValueError(f"{requirement!r} is not a requirement; write name or name>=1.2")
    return match[1], match[2]

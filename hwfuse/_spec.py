"""An op's spec: what its file in hwfuse/ops declares, read once."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.library import infer_schema

from hwfuse._errors import UnknownOp, suggestion


@functools.cache
def names() -> tuple[str, ...]:
    """Return the name of every op: the file names in hwfuse/ops."""
    files = Path(__file__).with_name("ops").glob("*.py")
    return tuple(sorted(file.stem for file in files if file.stem != "__init__"))


@dataclass(frozen=True, eq=False)
class Spec:
    """An op's contract.  `tensors`: its tensor arguments; `dims`: the names of their dimensions."""

    name: str
    function: Callable[..., Any]
    sizes: Callable[..., Any]
    outputs: Callable[..., Any]
    make_inputs: Callable[..., dict[str, Any]]
    compare: Mapping[str, tuple[str, dict[str, Any]]]
    dims: Mapping[str, tuple[str, ...]]
    mutates: tuple[str, ...]
    size_names: tuple[str, ...]
    signature: inspect.Signature = field(repr=False)

    @property
    def parameters(self) -> tuple[str, ...]:
        """All argument names, in order."""
        return tuple(self.signature.parameters)

    @functools.cached_property
    def tensors(self) -> tuple[str, ...]:
        """The tensor arguments, in order."""
        kinds = inspect.get_annotations(self.function, eval_str=True)
        return tuple(name for name in self.parameters if kinds[name] is torch.Tensor)

    @property
    def positional(self) -> tuple[str, ...]:
        """The arguments that may be passed by position: the tensors."""
        values = self.signature.parameters.values()
        return tuple(p.name for p in values if p.kind is p.POSITIONAL_OR_KEYWORD)

    @functools.cached_property
    def schema(self) -> str:
        """The torch schema, without the op's name."""
        return str(infer_schema(self.function, mutates_args=self.mutates))

    @property
    def vocabulary(self) -> frozenset[str]:
        """Every word that a fact about this op may use, besides arch and vendor."""
        return frozenset((*self.parameters, *self.size_names))

    def split(self, arguments: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Turn arguments by name into the positional and the keyword part of a call."""
        args = tuple(arguments[name] for name in self.positional)
        return args, {k: v for k, v in arguments.items() if k not in self.positional}

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return all arguments of a call by name, defaults filled in."""
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)


@functools.cache
def load(name: str) -> Spec:
    """Read the spec file of one op; UnknownOp names the closest one."""
    if name not in names():
        known = ", ".join(names())
        raise UnknownOp(f"no op is called {name!r}{suggestion(name, names())}; ops: {known}")
    module: Any = importlib.import_module(f"hwfuse.ops.{name}")
    function = getattr(module, name)
    return Spec(
        name=name,
        function=function,
        sizes=module.sizes,
        outputs=module.outputs,
        make_inputs=module.make_inputs,
        compare=module.COMPARE,
        dims={tensor: tuple(text.split()) for tensor, text in module.DIMS.items()},
        mutates=getattr(module, "MUTATES", ()),
        size_names=module.Sizes._fields,
        signature=inspect.signature(function),
    )

"""Replays in Python, where the C half (_native.c) is not to be had: same recipes, same checks.

Two kinds of function are generated.  One per op asks the recipe that held last, then looks the call
up by the dtypes, shapes, strides and options of its arguments.  One per recipe checks that it
holds, allocates and launches; it has no loops.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from hwfuse_triton import _private, _record

LIMIT = 256  # recipes of an op; then they begin anew
_MISS = object()


class Replays:
    """A function with its recipes.  `call` is what a user calls."""

    def __init__(self, function: Callable[..., Any], missed: Callable[..., Any]) -> None:
        parameters = inspect.signature(function).parameters.values()
        self.tensors = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        self.options = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        self.table: dict[Any, Any] = {}
        self.known: set[Any] = set()
        self.never: set[Any] = set()
        self.key, self.call = self._generate(function.__name__, list(parameters), missed)

    def _generate(
        self, name: str, parameters: list[inspect.Parameter], missed: Callable[..., Any]
    ) -> tuple[Callable[..., Any], Callable[..., Any]]:
        self.scope = {"get": self.table.get, "missed": missed, "MISS": _MISS, "last": _nothing}
        heads = []
        for p in parameters:
            if p.kind is p.KEYWORD_ONLY and "*" not in heads:
                heads.append("*")
            heads.append(p.name if p.default is p.empty else f"{p.name}=default_{p.name}")
            self.scope[f"default_{p.name}"] = p.default
        parts = [f"{t}.shape, {t}.stride(), {t}.dtype, {t}.data_ptr() & 255" for t in self.tensors]
        key = f"({', '.join([*parts, *self.options])},)"
        given = ", ".join([*self.tensors, *self.options])
        passed = ", ".join([*self.tensors, *(f"{o}={o}" for o in self.options)])
        source = f"""
def key({", ".join(heads)}):
    return {key}
def {name}({", ".join(heads)}):
    global last
    result = last({given})
    if result is not MISS:
        return result
    try:
        found = get({key})
    except LOOKUP_ERRORS:
        found = None
    if found is not None and found is not last:
        last = found
        result = found({given})
        if result is not MISS:
            return result
    return missed({passed})
"""
        # Not a tensor, not hashable, a tensor without an address.
        self.scope["LOOKUP_ERRORS"] = (AttributeError, TypeError, RuntimeError)
        exec(compile(source, f"<replay of {name}>", "exec"), self.scope)  # noqa: S102
        return self.scope["key"], self.scope[name]

    @property
    def size(self) -> int:
        """How many recipes are kept."""
        return len(self.table)

    def seen(self, *args: Any, **kwargs: Any) -> bool:
        """Say whether such a call could have a recipe and was asked for before."""
        tensors = [*args, *(kwargs[name] for name in self.tensors if name in kwargs)]
        if len({id(t) for t in tensors}) < len(tensors) or any(_strange(t) for t in tensors):
            return False
        if any(isinstance(v, Tensor) or _ambiguous(v) for k, v in kwargs.items()
               if k not in self.tensors):  # fmt: skip
            return False
        key = self.key(*args, **kwargs)
        if key in self.table or key in self.never:
            return False  # it has a recipe, which did not hold just now
        if key in self.known:
            return True
        _keep(self.known, key)
        return False

    def refuse(self, *args: Any, **kwargs: Any) -> None:
        """Note that such a call cannot be recorded."""
        _keep(self.never, self.key(*args, **kwargs))

    def add(self, args: tuple[Any, ...], kwargs: dict[str, Any], recipe: _record.Recipe) -> None:
        """Remember a recipe for calls like this."""
        if kwargs.keys() & set(self.tensors):
            raise ValueError("a tensor was given by keyword")
        values = [kwargs.get(o, self.scope[f"default_{o}"]) for o in self.options]
        if len(self.table) >= LIMIT:
            self.table.clear()
        self.table[self.key(*args, **kwargs)] = _function(recipe, args, values, len(kwargs))

    def forget(self) -> None:
        """Drop all recipes."""
        self.scope["last"] = _nothing
        self.table.clear()
        self.known.clear()
        self.never.clear()


def _nothing(*_: Any) -> Any:
    return _MISS


def _keep(keys: set[Any], key: Any) -> None:
    if len(keys) >= LIMIT:
        keys.clear()
    keys.add(key)


def _strange(value: Any) -> bool:
    return (
        type(value) not in (Tensor, Parameter)
        or value.get_device() != _private.current_device()
        or not value.data_ptr()
        or bool(value.data_ptr() % 16)
    )


def _ambiguous(value: Any) -> bool:
    """Say whether a key cannot tell the value from another: -0.0 equals 0.0, NaN not itself."""
    return isinstance(value, float) and (not value or math.isnan(value))


def _function(
    recipe: _record.Recipe, args: tuple[Any, ...], options: list[Any], given: int
) -> Callable[..., Any]:
    """Generate what repeats a recipe on new tensors.  *given*: options that were passed."""
    hooks, stream = _private.hooks(), _private.raw_stream
    others = [k for k, _, _ in recipe.launches if not hasattr(k.keep, "compiled")]
    if hooks is None or stream is None or others:
        raise ValueError("only Triton's kernels are replayed in Python")
    shift = len(args) + given  # numbers from here on are what was allocated
    names = {i: f"p{i}" for i in range(len(args))}
    names |= {shift + i: f"q{i}" for i in range(len(recipe.allocations))}
    scope: dict[str, Any] = {
        "Tensor": Tensor, "Parameter": Parameter, "MISS": _MISS, "device": args[0].get_device(),
        "current": _private.current_device, "modes": _private.mode_depth, "stream": stream,
        "allocate": _private.empty_strided_cuda, "knobs": hooks.knobs, "enter": hooks.enter,
        "leave": hooks.exit, "inf": math.inf, "nan": math.nan,
    }  # fmt: skip
    scope["same"] = _check(args) if _check_is_strict() else lambda *_: False
    for i, tensor in enumerate(args):
        scope |= {f"S{i}": tensor.shape, f"T{i}": tensor.stride(), f"D{i}": tensor.dtype}
    for i, value in enumerate(options):
        scope |= {f"C{i}": value, f"K{i}": type(value)}
    tensors = ", ".join(f"x{i}" for i in range(len(args)))
    lines = [f"if not same({tensors}) and ({' or '.join(_other_kind(len(args)))}): return MISS"]
    lines += [f"if o{i} is not C{i} and (type(o{i}) is not K{i} or o{i} != C{i}): return MISS"
              for i in range(len(options))]  # fmt: skip
    lines += [f"p{i} = x{i}.data_ptr()" for i in range(len(args))]
    lines += [f"if {' or '.join(_wrong(recipe, args))}: return MISS"]
    for i, form in enumerate(recipe.allocations):
        scope[f"shape{i}"], scope[f"strides{i}"], scope[f"dtype{i}"] = form
        lines.append(f"y{i} = allocate(shape{i}, strides{i}, dtype{i})")
        lines.append(f"q{i} = y{i}.data_ptr()")
    if recipe.allocations:
        bits = " | ".join(f"q{i}" for i in range(len(recipe.allocations)))
        lines.append(f"if ({bits}) & 15: return MISS")
    lines += _launches(recipe, names, scope)
    lines.append(f"return {_result(recipe.result, names)}")
    heads = [f"x{i}" for i in range(len(args))] + [f"o{i}" for i in range(len(options))]
    source = f"def again({', '.join(heads)}):\n    " + "\n    ".join(lines)
    exec(compile(source, "<recipe>", "exec"), scope)  # noqa: S102
    made: Callable[..., Any] = scope["again"]
    return made


def _launches(recipe: _record.Recipe, names: dict[int, str], scope: dict[str, Any]) -> list[str]:
    """Return the lines that launch; what they name goes to *scope*."""
    lines = ["queue = stream(device)"]
    for i, (kernel, (x, y, z), values) in enumerate(recipe.launches):
        plan, compiled = kernel.keep, kernel.keep.compiled
        scope[f"run{i}"], scope[f"function{i}"] = compiled.run, compiled.function
        scope[f"packed{i}"] = compiled.packed_metadata
        shown = [names[v] if kind == "P" else repr(v)
                 for kind, v in zip(plan.kinds, values, strict=True)]  # fmt: skip
        shown += ["None"] * plan.constants
        more = f"function{i}, packed{i}, None, None, None, {', '.join(shown)}"
        lines.append(f"run{i}({x}, {y}, {z}, queue, {more})")
    return lines


def _check(tensors: Sequence[Any]) -> Callable[..., bool]:
    """Return what says in C++ whether tensors have the format of *tensors*; private to torch."""
    made = _private.tensor_guards(
        *tensors,
        dynamic_dims_sizes=[list(t.shape) for t in tensors],
        dynamic_dims_strides=[list(t.stride()) for t in tensors],
    )
    check: Callable[..., bool] = made.check
    return check


@functools.cache
def _check_is_strict() -> bool:
    """Try the private check: it has to see every single difference that a recipe depends on."""
    x = torch.empty(1, 3, 4)
    others = [
        torch.empty(1, 3, 4, dtype=torch.int32),
        torch.empty(1, 3, 5),
        torch.empty(3, 4),
        x.as_strided((1, 3, 4), (99, 4, 1)),  # of a dimension of size 1
        torch.empty(1, 3, 8)[..., :4],
        x.to("meta"),
        x.as_subclass(type("Subclass", (Tensor,), {})),
    ]
    try:
        check = _check([x])
        return check(x) and check(x.clone()) and not any(check(other) for other in others)
    except Exception:  # noqa: BLE001 - another release's: the checks in Python are as right
        return False


def _other_kind(tensors: int) -> list[str]:
    """Return the conditions under which tensors have not the recorded format."""
    return [
        *(f"type(x{i}) is not Tensor and type(x{i}) is not Parameter" for i in range(tensors)),
        *(f"x{i}.shape != S{i} or x{i}.stride() != T{i}" for i in range(tensors)),
        *(f"x{i}.dtype is not D{i} or x{i}.get_device() != device" for i in range(tensors)),
    ]


def _wrong(recipe: _record.Recipe, args: tuple[Any, ...]) -> list[str]:
    """Return the conditions under which a recipe does not hold for a call of its kind."""
    every = range(len(args))
    # Only tensors of one format can be one tensor; which of two a kernel gets would be a guess.
    twins = [
        f"x{i} is x{j}" for i in every for j in range(i) if _format(args[i]) == _format(args[j])
    ]
    low = [(f"p{i} ^ {tensor.data_ptr() & 255}" if tensor.data_ptr() & 255 else f"p{i}")
           for i, tensor in enumerate(args)]  # fmt: skip
    wrong = [
        f"({' | '.join(low)}) & 255",
        f"not ({' and '.join(f'p{i}' for i in every)})",
        *twins,
    ]
    near = {v for k, _, values in recipe.launches for i, v in enumerate(values) if i in k.keep.near}
    wrong += [f"x{i}.untyped_storage().nbytes() > 0x7FFFFFFF" for i in near if i < len(args)]
    return [
        *wrong,
        "current() != device",
        "modes()",
        "knobs.launch_enter_hook is not enter or enter.calls",
        "knobs.launch_exit_hook is not leave or leave.calls",
    ]


def _format(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype


def _result(result: int | tuple[int, ...] | None, names: dict[int, str]) -> str:
    tensors = {i: name.replace("p", "x").replace("q", "y") for i, name in names.items()}
    if result is None:
        return "None"
    if isinstance(result, int):
        return tensors[result]
    return f"({', '.join(tensors[i] for i in result)},)"

"""`Op.bind`: decide once, freeze, and pay nothing per call."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from hwfuse import _cuda, _device, _facts, _guard, _report, _select, _state
from hwfuse._errors import InputError, suggestion
from hwfuse._facts import Fact
from hwfuse._select import Call
from hwfuse._spec import Spec

if TYPE_CHECKING:
    from hwfuse._op import Op


def bind(op: Op, device: torch.device, constants: Mapping[str, Any]) -> Callable[..., Any]:
    """Return the implementation that *device* gets, with the op's keyword *constants* filled in.

    Args:
        op: The op.
        device: Where the calls will run.
        constants: Keyword arguments of the op, which become defaults, and promises: sizes
            (``m=1``) or ``dtypes={"x": torch.bfloat16}``.  A promise that a chosen implementation
            relies on is checked on every call.

    Returns:
        The implementation itself where nothing needs a check, so that a call costs what a direct
        call costs; behind a check of promises, or of the device where there are several, it costs
        what a call of the op costs.  ``.decision`` says what it is.  Later policy changes do not
        reach it.
    """
    constants = dict(constants)
    dtypes = constants.pop("dtypes", {})
    call = _call(op, device, constants, dtypes)
    try:
        order = _state.policy().order(op.spec.name, call.values)
    except (NameError, AttributeError) as error:
        needed = "a promise of all that the rules of the policy look at, such as m=1"
        raise InputError("bind", error, needed) from error
    registry = _state.registry()
    decision = _select.select(call, order, registry)
    _state.settle(decision, order)
    implementation = registry.implementations(op.spec.name)[decision.chosen]
    options = {k: v for k, v in constants.items() if k in op.spec.parameters}
    if "dtype" in op.spec.parameters:
        options["dtype"] = call.values["dtype"]
    function = implementation.load()
    checks = [f for f in implementation.requires.facts if not f.names <= _facts.DEVICE_NAMES]
    if checks or _is_one_of_many(device):
        guarded = _guarded(op.spec, function, checks, _with_index(device), call)
        function = functools.partial(guarded, **options)
    else:
        function = _with_defaults(function, options)
    function.decision = decision  # type: ignore[attr-defined]
    return function


def _call(
    op: Op, device: torch.device, constants: Mapping[str, Any], dtypes: Mapping[str, torch.dtype]
) -> Call:
    spec = op.spec
    known = (*spec.parameters, *spec.size_names)
    for name in constants:
        if name in spec.tensors:
            raise InputError(name, "a tensor", "no tensors: bind takes options and sizes")
        if name not in known:
            raise InputError(name, "an unknown name", f"one of {known}{suggestion(name, known)}")
    for name in dtypes:
        if name not in spec.tensors:
            needed = f"one of {spec.tensors}{suggestion(name, spec.tensors)}"
            raise InputError(f"dtypes[{name!r}]", "an unknown name", needed)
    target = _device.target_of(device)
    defaults = {
        p.name: p.default for p in spec.signature.parameters.values() if p.default is not p.empty
    }
    values: dict[str, Any] = {**defaults, **constants, "arch": target.arch, "vendor": target.vendor}
    if values.get("dtype", 0) is None:
        values["dtype"] = _device.fp8_dtype(device)
    # Facts read the dtype of a promised tensor and nothing else of it.
    tensors = {name: SimpleNamespace(dtype=dtype) for name, dtype in dtypes.items()}
    reads = {*known, *(f"{name}.dtype" for name in spec.tensors)}
    return Call(
        op=spec.name,
        target=target,
        values={**values, **tensors},
        facts={"target": str(target), **{k: _facts.show(v) for k, v in constants.items()}},
        pretended=_device.pretended.get() is not None,
        unknown=frozenset(reads - values.keys() - {f"{name}.dtype" for name in dtypes}),
    )


def _with_defaults(function: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """Return a copy of a plain function with other keyword defaults: no wrapper, no cost."""
    if not isinstance(function, types.FunctionType):
        raise TypeError(f"{function!r} is not a plain function; an implementation must be one")
    copy = types.FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = {**(function.__kwdefaults__ or {}), **options}
    copy.__doc__ = function.__doc__
    return copy


def _guarded(
    spec: Spec, function: Callable[..., Any], facts: list[Fact], device: torch.device, bound: Call
) -> Callable[..., Any]:
    """Return *function* behind a memo guard whose cold path checks device and promises."""
    words = {word: bound.values[word] for word in _facts.DEVICE_NAMES}

    def check(*values: Any) -> Any:
        arguments = dict(zip(spec.parameters, values, strict=True))
        first = arguments[spec.tensors[0]]
        if first.device != device:
            raise InputError(f"{spec.tensors[0]}.device", first.device, f"{device}, as bound")
        known = {**spec.sizes(**arguments)._asdict(), **arguments, **words}
        for fact in facts:
            if not fact.holds(known):
                raise InputError(
                    spec.name, _report.reason(fact, known), "what was promised to bind"
                )
        if len(table) >= _guard.TABLE_LIMIT:
            table.clear()
        launched = _cuda.on(device, function) if device.type == "cuda" else function
        table[key(*values)] = launched
        args, kwargs = spec.split(arguments)
        return launched(*args, **kwargs)

    run, key, table = _guard.build(spec, facts, lambda: None, check)
    call = _guard.entrance(spec, lambda: False)
    return functools.partial(call, types.SimpleNamespace(_run=run))


def _with_index(device: torch.device) -> torch.device:
    """Return *device* with the index that ``cuda`` alone means now."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def _is_one_of_many(device: torch.device) -> bool:
    """Tell whether another device of this kind may be current when a kernel is launched."""
    return device.type == "cuda" and torch.cuda.device_count() > 1

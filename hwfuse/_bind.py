"""`Op.bind`: decide once, freeze, and pay nothing per call."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from hwfuse import _device, _facts, _select, _state
from hwfuse._errors import InputError, NoImplementation, suggestion
from hwfuse._facts import Fact
from hwfuse._select import Call

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
        call costs.  ``.decision`` says what it is.  Later policy changes do not reach it.
    """
    constants = dict(constants)
    dtypes = constants.pop("dtypes", {})
    call = _call(op, device, constants, dtypes)
    order = _state.policy().order(op.spec.name, call.values)
    decision = _select.select(call, order, _state.registry())
    if not decision.chosen:
        raise NoImplementation(f"nothing can be bound\n{decision}", decision)
    implementation = _state.registry().implementations(op.spec.name)[decision.chosen]
    options = {k: v for k, v in constants.items() if k in op.spec.parameters}
    if "dtype" in op.spec.parameters:
        options["dtype"] = call.values["dtype"]
    function = _with_defaults(implementation.load(), options)
    checks = [f for f in implementation.requires.facts if not f.names <= _facts.DEVICE_NAMES]
    if checks or device.type != "cpu":
        function = _checked(op, function, options, checks, device)
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
    target = _device.target_of(device)
    defaults = {
        p.name: p.default
        for p in spec.signature.parameters.values()
        if p.default is not p.empty
    }
    values: dict[str, Any] = {**defaults, **constants, "arch": target.arch, "vendor": target.vendor}
    if values.get("dtype", 0) is None:
        values["dtype"] = _device.fp8_dtype(device)
    tensors = {name: torch.empty(0, dtype=dtype, device="meta") for name, dtype in dtypes.items()}
    return Call(
        op=spec.name,
        target=target,
        values={**values, **tensors},
        facts={"target": str(target), **{k: _facts.show(v) for k, v in constants.items()}},
        pretended=_device.pretended.get() is not None,
        unknown=frozenset(known) - frozenset(values) - frozenset(tensors),
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


def _checked(
    op: Op,
    function: Callable[..., Any],
    options: Mapping[str, Any],
    checks: list[Fact],
    device: torch.device,
) -> Callable[..., Any]:
    spec = op.spec

    def call(*args: Any, **kwargs: Any) -> Any:
        arguments = spec.bind(args, {**options, **kwargs})
        first = arguments[spec.tensors[0]]
        if first.device.type != device.type or device.index not in (None, first.device.index):
            raise InputError(f"{spec.tensors[0]}.device", first.device, f"{device}, as bound")
        if checks:
            values = {**spec.sizes(**arguments)._asdict(), **arguments}
            for fact in checks:
                if not fact.holds(values):
                    raise InputError(spec.name, fact.reason(values), "what was promised to bind")
        return function(*args, **kwargs)

    return call

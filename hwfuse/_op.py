"""The op object: what `hwfuse.op` returns, and the cold path behind its first calls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from hwfuse import _device, _facts, _guard, _select, _spec, _state
from hwfuse._decision import Decision
from hwfuse._device import Target, fp8_dtype
from hwfuse._errors import InputError
from hwfuse._facts import Fact
from hwfuse._implementation import REFERENCE
from hwfuse._plugins import Registry
from hwfuse._policy import Order
from hwfuse._select import Call
from hwfuse._spec import Spec

_is_tracing = torch.compiler.is_dynamo_compiling
_ops: dict[str, Op] = {}
_defined: set[str] = set()  # names that torch knows


class Op:
    """One op.  Call it as its spec says; there is one object per name."""

    spec: Spec
    _run: Callable[..., Any]
    _memo: tuple[Callable[..., tuple[Any, ...]], dict[tuple[Any, ...], Callable[..., Any]]]
    _facts: frozenset[Fact]

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self._reset()
        _state.listeners.append(self._reset)

    if TYPE_CHECKING:  # the real one is generated per op, with the op's own signature

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    @functools.cached_property
    def node(self) -> Any:
        """The overload ``torch.ops.hwfuse.<op>.default``, registered when first asked for."""
        from hwfuse import _node

        with _state.lock:
            if self.spec.name not in _defined:
                _defined.add(self.spec.name)  # first: registering looks the name up itself
                _node.define(self.spec, self._run_node, self._differentiable)
        return getattr(torch.ops.hwfuse, self.spec.name).default

    def __repr__(self) -> str:
        return f"hwfuse.op({self.spec.name!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return op, (self.spec.name,)

    def using(self, *ids: str) -> Callable[..., Any]:
        """Return this op with an order of its own: one id pins, several are an order."""
        from hwfuse import _using

        return _using.of_one_op(self, ids)

    def bind(self, *, device: torch.device | str, **constants: Any) -> Callable[..., Any]:
        """Decide once and return the implementation with *constants* filled in; see _bind.py."""
        from hwfuse import _bind

        return _bind.bind(self, torch.device(device), constants)

    def decide(
        self, arguments: Mapping[str, Any], registry: Registry | None = None, **overrides: Any
    ) -> tuple[Decision, Order, Call]:
        """Select for one call; raises only what `sizes` or a fact raises."""
        # Where the op has no gradient, no implementation is refused for the lack of one.
        needs_gradient = self._wants_gradient(arguments) and self._differentiable() is not None
        call = make_call(self.spec, arguments, needs_gradient=needs_gradient, **overrides)
        order = _state.policy().order(self.spec.name, call.values)
        return _select.select(call, order, registry or _state.registry()), order, call

    def _reset(self) -> None:
        self._install(frozenset())

    def _install(self, facts: frozenset[Fact]) -> None:
        run, key, table = _guard.build(self.spec, facts, _state.context.get, self._other)
        with _state.lock:  # key and table belong together: read and write them as one
            self._facts, self._memo, self._run = facts, (key, table), run

    def _other(self, *values: Any) -> Any:
        """Take a call the guard let through: its first of this kind, or not plain tensors."""
        arguments = dict(zip(self.spec.parameters, values, strict=True))
        tensors = _tensors(self.spec, arguments)
        plain = all(type(t) in (Tensor, Parameter) and not t.is_meta for t in tensors)
        if plain and not _guard.mode_depth():
            function = self._choose(arguments)
        else:
            arguments, function = _resolved(self.spec, arguments), self.node
        args, kwargs = self.spec.split(arguments)
        return function(*args, **kwargs)

    def _run_node(self, *args: Any, **kwargs: Any) -> Any:
        """Run the node: the same table, without the look for subclasses and modes."""
        arguments = self.spec.bind(args, kwargs)
        key, table = self._memo
        try:
            function = table.get(key(*arguments.values()))
        except Exception:  # noqa: BLE001 - wrong input or a bug in a fact: the cold path names it
            function = None
        return (function or self._choose(arguments))(*args, **kwargs)

    def _choose(self, arguments: Mapping[str, Any]) -> Callable[..., Any]:
        """Decide, remember and return the function for this call and all that are like it."""
        memo = self._memo
        if self._wants_gradient(arguments) and self._differentiable() is None:
            # The node's autograd kernel raises in backward; forward must work without no_grad.
            self.spec.sizes(**arguments)
            return self._with_dtype(self.node, arguments)
        registry = _state.registry()  # one for all of this: another thread may configure
        decision, order, call = self.decide(arguments, registry)
        first = arguments[self.spec.tensors[0]]
        if first.is_cuda:
            from hwfuse import _cuda

            _cuda.refuse_capture(self.spec.name)
        _state.settle(decision, order)
        function = registry.implementations(self.spec.name)[decision.chosen].load()
        if first.is_cuda:  # whether its device is the current one is in the key
            function = _cuda.on(first.device, function)
        function = self._with_dtype(function, arguments)
        if self.spec.mutates:
            from hwfuse import _node

            function = _node.telling_autograd(function, self.spec)
        for recorder in _state.recorders:
            function = recorder.counting(function, self.spec.name, decision.chosen)
        facts = _select.deciding_facts(call, order, registry)
        facts.update(_state.policy().facts(self.spec.name))
        self._remember(arguments, function, frozenset(facts), memo)
        _state.first_use(decision)
        return function

    def _remember(
        self, arguments: Mapping[str, Any], function: Any, facts: frozenset[Fact], memo: object
    ) -> None:
        with _state.lock:
            if self._memo is not memo:
                return  # policy or facts changed while this call was decided: decide again
            if not facts <= self._facts or len(self._memo[1]) >= _guard.TABLE_LIMIT:
                self._install(self._facts | facts)
            key, table = self._memo
            table[key(*arguments.values())] = function

    def _with_dtype(
        self, function: Callable[..., Any], arguments: Mapping[str, Any]
    ) -> Callable[..., Any]:
        """Fill in what dtype=None means on this device; the memo key holds the None."""
        if "dtype" not in arguments or arguments["dtype"] is not None:
            return function
        dtype = _resolved(self.spec, arguments)["dtype"]

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["dtype"] = dtype
            return function(*args, **kwargs)

        return call

    def _wants_gradient(self, arguments: Mapping[str, Any]) -> bool:
        tensors = _tensors(self.spec, arguments)
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)

    def _differentiable(self) -> Callable[..., Any] | None:
        reference = _state.registry().implementations(self.spec.name).get(REFERENCE)
        if reference is None or not reference.requires.differentiable:
            return None
        return reference.load()


def op(name: str) -> Op:
    """Return the op called *name*: one object per name.

    Raises:
        UnknownOp: No op has this name; the text suggests the closest.
    """
    if _is_tracing():
        getattr(torch.ops.hwfuse, name, None)  # defines the op outside of the traced code
    found = _ops.get(name)
    return _create(name) if found is None else found


def _create(name: str) -> Op:
    with _state.lock:
        if name not in _ops:
            spec = _spec.load(name)
            # A class per op, so that its call has the op's own signature; never changed again,
            # because compiled code guards on it.
            call = _guard.entrance(spec, _is_tracing)
            body = {"__call__": call, "__doc__": spec.function.__doc__, "__slots__": ()}
            _ops[name] = type(f"Op_{name}", (Op,), body)(spec)
    return _ops[name]


def _tensors(spec: Spec, arguments: Mapping[str, Any]) -> list[Tensor]:
    for name in spec.tensors:
        if not isinstance(arguments[name], Tensor):
            raise InputError(name, f"a {type(arguments[name]).__name__}", "a torch.Tensor")
    return [arguments[name] for name in spec.tensors]


def _resolved(spec: Spec, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments with what dtype=None means on the tensors' device."""
    if "dtype" in arguments and arguments["dtype"] is None:
        return {**arguments, "dtype": fp8_dtype(arguments[spec.tensors[0]].device)}
    return dict(arguments)


def make_call(
    spec: Spec,
    arguments: Mapping[str, Any],
    *,
    target: Target | None = None,
    absent: bool = False,
    pretended: bool | None = None,
    needs_gradient: bool = False,
) -> Call:
    """Check the call's arguments with `sizes` and collect what selection looks at."""
    values = _resolved(spec, arguments)
    sizes = spec.sizes(**values)._asdict()
    real = target or _device.target_of(arguments[spec.tensors[0]].device)
    options = {k: _facts.show(v) for k, v in values.items() if k not in spec.tensors}
    dtypes = {f"{name}.dtype": _facts.show(arguments[name].dtype) for name in spec.tensors}
    return Call(
        op=spec.name,
        target=real,
        values={**sizes, **values, "arch": real.arch, "vendor": real.vendor},
        facts={"target": str(real), **dtypes, **sizes, **options},
        needs_gradient=needs_gradient,
        pretended=_device.pretended.get() is not None if pretended is None else pretended,
        absent=absent,
    )


class _Namespace(torch._ops._OpNamespace):
    """``torch.ops.hwfuse``, which registers an op when its name is first asked for.

    So an exported program loads and compiled code traces although nobody called `op` yet.
    """

    __module__ = "torch.ops"

    def __getattr__(self, name: str) -> Any:
        if name in _spec.names() and name not in _defined:
            _ = _create(name).node
        # Registering looked the name up already; asking again would make a second object of it.
        return self.__dict__.get(name) or super().__getattr__(name)


torch.ops.hwfuse = _Namespace("hwfuse")  # type: ignore[attr-defined]

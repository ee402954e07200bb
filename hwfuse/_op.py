"""The op object: what `hwfuse.op` returns, and the cold path behind its first calls."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from hwfuse import _device, _facts, _guard, _node, _select, _spec, _state
from hwfuse._decision import Decision
from hwfuse._device import Target, fp8_dtype
from hwfuse._errors import (
    ColdCallInCapture,
    HwfuseError,
    InputError,
    NoImplementation,
    PinnedUnavailable,
)
from hwfuse._facts import Fact
from hwfuse._implementation import REFERENCE
from hwfuse._policy import Order
from hwfuse._select import Call
from hwfuse._spec import Spec

_TABLE_LIMIT = 4096  # entries; reached only by facts about derived sizes, whose key is raw shapes
_is_tracing = torch.compiler.is_dynamo_compiling
_ops: dict[str, Op] = {}
_lock = threading.RLock()


class Op:
    """One op.  Call it as its spec says; there is one object per name."""

    spec: Spec
    node: Any
    _run: Callable[..., Any]
    _key: Callable[..., tuple[Any, ...]]
    _table: dict[tuple[Any, ...], Callable[..., Any]]
    _facts: frozenset[Fact]

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self._reset()
        _state.listeners.append(self._reset)
        self.node = _node.define(spec, self._run_node, self._differentiable)

    def __repr__(self) -> str:
        return f"hwfuse.op({self.spec.name!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return op, (self.spec.name,)

    def using(self, *ids: str) -> Callable[..., Any]:
        """Return this op with an order of its own: one id pins, several are an order."""
        value = ids[0] if len(ids) == 1 else ids
        items = ((self.spec.name, value),)

        @functools.wraps(self.spec.function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if _is_tracing():
                raise HwfuseError(
                    f"{self!r}.using(…) cannot be traced; put hwfuse.using(…) around the compiled "
                    "call: it acts on compiled code at once"
                )
            with scope(items, "op.using"):
                return self(*args, **kwargs)

        return call

    def explain(self, *args: Any, **kwargs: Any) -> Decision:
        """Return the decision for a call without running it; see `hwfuse.explain`."""
        return explain(self.spec.name, *args, **kwargs)

    def bind(self, *, device: torch.device | str, **constants: Any) -> Callable[..., Any]:
        """Decide once and return the implementation with *constants* filled in; see _bind.py."""
        from hwfuse import _bind

        return _bind.bind(self, torch.device(device), constants)

    def decide(self, arguments: Mapping[str, Any], **overrides: Any) -> tuple[Decision, Order, Call]:
        """Select for one call; raises only what `sizes` or a fact raises."""
        call = make_call(self.spec, arguments, **overrides)
        order = _state.policy().order(self.spec.name, call.values)
        return _select.select(call, order, _state.registry()), order, call

    def _reset(self) -> None:
        self._install(frozenset())

    def _install(self, facts: frozenset[Fact]) -> None:
        run, key, table = _guard.build(self.spec, facts, _state.context.get, self._other)
        self._facts, self._key, self._table, self._run = facts, key, table, run

    def _other(self, *values: Any) -> Any:
        """Take a call the guard let through: its first of this kind, or not plain tensors."""
        arguments = dict(zip(self.spec.parameters, values, strict=True))
        for name in self.spec.tensors:
            if not isinstance(arguments[name], Tensor):
                raise InputError(name, f"a {type(arguments[name]).__name__}", "a torch.Tensor")
        plain = all(type(arguments[name]) in (Tensor, Parameter) for name in self.spec.tensors)
        if plain and not _guard.mode_depth():
            args, kwargs = self.spec.split(arguments)
            return self._choose(arguments)(*args, **kwargs)
        args, kwargs = self.spec.split(self._resolved(arguments))
        return self.node(*args, **kwargs)

    def _run_node(self, *args: Any, **kwargs: Any) -> Any:
        """Run the node: the same table, without the look for subclasses and modes."""
        arguments = self.spec.bind(args, kwargs)
        function = self._table.get(self._key(*arguments.values())) or self._choose(arguments)
        return function(*args, **kwargs)

    def _resolved(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        if "dtype" in arguments and arguments["dtype"] is None:
            return {**arguments, "dtype": fp8_dtype(arguments[self.spec.tensors[0]].device)}
        return dict(arguments)

    def _choose(self, arguments: Mapping[str, Any]) -> Callable[..., Any]:
        """Decide, remember and return the function for this call and all that are like it."""
        needs_gradient = torch.is_grad_enabled() and any(
            arguments[name].requires_grad for name in self.spec.tensors
        )
        if needs_gradient and self._differentiable() is None:
            # The node's autograd kernel raises in backward; forward must work without no_grad.
            self.spec.sizes(**arguments)
            return self._with_dtype(self.node, arguments)
        decision, order, call = self.decide(arguments)
        _refuse_capture(self.spec.name, arguments[self.spec.tensors[0]])
        if not decision.chosen:
            raise _unavailable(decision, order)
        _announce(decision)
        function = _state.registry().implementations(self.spec.name)[decision.chosen].load()
        function = self._with_dtype(_on_its_device(function, arguments, self.spec), arguments)
        for recorder in _state.recorders:
            function = recorder.counting(function, self.spec.name, decision.chosen)
        self._remember(arguments, function, decision, self._deciding(order, call))
        return function

    def _deciding(self, order: Order, call: Call) -> frozenset[Fact]:
        facts = _select.deciding_facts(call, order, _state.registry())
        return frozenset((*facts, *_state.policy().facts(self.spec.name)))

    def _remember(
        self,
        arguments: Mapping[str, Any],
        function: Callable[..., Any],
        decision: Decision,
        facts: frozenset[Fact],
    ) -> None:
        with _lock:
            if not facts <= self._facts or len(self._table) >= _TABLE_LIMIT:
                self._install(self._facts | facts)
            key = self._key(*arguments.values())
            self._table[key] = function
        _state.first_use(decision, key)

    def _with_dtype(
        self, function: Callable[..., Any], arguments: Mapping[str, Any]
    ) -> Callable[..., Any]:
        """Fill in what dtype=None means on this device; the memo key holds the None."""
        if "dtype" not in arguments or arguments["dtype"] is not None:
            return function
        dtype = self._resolved(arguments)["dtype"]

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["dtype"] = dtype
            return function(*args, **kwargs)

        return call

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
    with _lock:
        if name not in _ops:
            spec = _spec.load(name)
            # A class per op, so that its call has the op's own signature; never changed again,
            # because compiled code guards on it.
            call = _guard.entrance(spec, _is_tracing)
            _ops[name] = type(f"Op_{name}", (Op,), {"__call__": call, "__slots__": ()})(spec)
    return _ops[name]


def make_call(
    spec: Spec,
    arguments: Mapping[str, Any],
    *,
    target: Target | None = None,
    absent: bool = False,
    pretended: bool | None = None,
    needs_gradient: bool | None = None,
) -> Call:
    """Check the call's arguments with `sizes` and collect what selection looks at."""
    first = arguments[spec.tensors[0]]
    values = dict(arguments)
    if values.get("dtype", 0) is None:
        values["dtype"] = fp8_dtype(first.device)
    sizes = spec.sizes(**values)._asdict()
    real = target or _device.target_of(first.device)
    options = {k: _facts.show(v) for k, v in values.items() if k not in spec.tensors}
    dtypes = {f"{name}.dtype": _facts.show(arguments[name].dtype) for name in spec.tensors}
    if needs_gradient is None:
        tensors = [arguments[name] for name in spec.tensors]
        needs_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return Call(
        op=spec.name,
        target=real,
        values={**sizes, **values, "arch": real.arch, "vendor": real.vendor},
        facts={"target": str(real), **dtypes, **sizes, **options},
        needs_gradient=needs_gradient,
        pretended=_device.pretended.get() is not None if pretended is None else pretended,
        absent=absent,
    )


def explain(name: str, *args: Any, device: str | None = None, **kwargs: Any) -> Decision:
    """Say which implementation a call would run and why, without running it.

    Args:
        name: The op.
        *args: The tensors of a real call; or none, and the keywords are those of the spec's
            ``make_inputs``.
        device: Without tensors: ``"cuda:sm90"``, ``"rocm:gfx950"``, ``"cpu"``, also hardware that
            is not here; default: what this machine has.
        **kwargs: Options of the call, or sizes: ``m=64``.
    """
    this = op(name)
    if args or set(kwargs) & set(this.spec.tensors):
        return this.decide(this.spec.bind(args, kwargs))[0]
    if device is None or device.partition(":")[2].isdigit() or device == "cuda":
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        target, absent = _device.target_of(torch.device(place)), False
    else:
        target, absent = _device.parse(device), device != "cpu"
    token = _device.pretended.set(target)
    try:
        arguments = inputs(this.spec, device="meta", **kwargs)
        return this.decide(arguments, target=target, absent=absent, pretended=absent)[0]
    finally:
        _device.pretended.reset(token)


def inputs(spec: Spec, **keywords: Any) -> dict[str, Any]:
    """Call the spec's `make_inputs`; all arguments by name, defaults filled in."""
    try:
        args, kwargs = spec.split(spec.make_inputs(**keywords))
    except TypeError as error:
        raise InputError(f"{spec.name}.make_inputs", error, "its own keywords") from error
    return spec.bind(args, kwargs)


@contextmanager
def scope(items: tuple[tuple[str, tuple[str, ...] | str], ...], origin: str) -> Iterator[None]:
    """Enter a policy for this context only; *items*: op (or ``*``) to a pin or an order."""
    token = _state.context.set(_state.using_policy(_state.context.get(), items, origin))
    try:
        yield
    finally:
        _state.context.reset(token)


def _refuse_capture(name: str, tensor: Tensor) -> None:
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        raise ColdCallInCapture(
            f"first call of {name} of its kind inside a CUDA graph capture; choosing and compiling "
            f"cannot happen there: call it once before, or hwfuse.warmup({name!r}, …)"
        )


def _unavailable(decision: Decision, order: Order) -> NoImplementation:
    hint = f"more: python -m hwfuse explain {decision.op}"
    if order.pin:
        text = f"{order.ids[0]} is pinned by {order.origin} and cannot take this call"
        return PinnedUnavailable(f"{text}\n{decision}\n{hint}", decision)
    return NoImplementation(f"nothing can take this call\n{decision}\n{hint}", decision)


def _announce(decision: Decision) -> None:
    """Tell of missed preferences as `on_miss` says, and of the reference on an accelerator."""
    how, origin = _state.policy().on_miss
    hint = f"more: python -m hwfuse explain {decision.op}"
    if decision.misses and how == "error":
        text = f"{', '.join(decision.misses)} was preferred and cannot run (on_miss, {origin})"
        raise NoImplementation(f"{text}\n{decision}\n{hint}", decision)
    if how == "silent" or decision.pretended:
        return
    for missed in decision.misses:
        reasons = "; ".join(decision.rejected[missed])
        text = f"{decision.op}: {missed} is missed, {decision.chosen} runs: {reasons}. {hint}"
        _state.announce((decision.op, missed, decision.origin), text)
    if decision.chosen == REFERENCE and decision.facts["target"] != "cpu":
        where = decision.facts["target"]
        text = f"{decision.op} runs the reference on {where}, which is slow. {hint}"
        _state.announce((decision.op, "reference"), text)


def _on_its_device(
    function: Callable[..., Any], arguments: Mapping[str, Any], spec: Spec
) -> Callable[..., Any]:
    """Wrap the call when another device than the tensors' is current; the memo key holds which."""
    device = arguments[spec.tensors[0]].device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return function

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.cuda.device(device):
            return function(*args, **kwargs)

    return call


_node.install_namespace(_create)

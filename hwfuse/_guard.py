"""The memo guard of an op: a function generated from the facts that can change the choice.

Sizes appear in the key only as the truth of those facts, so the table stays small however many
different token counts arrive.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from hwfuse._device import fp8_dtype
from hwfuse._facts import DTYPES, PREDICATES, Fact
from hwfuse._spec import Spec

# Modes (FakeTensorMode, profilers of users) must see the op as one node, so they are looked for on
# every call.  Private names; without them the calls they would divert stay in the eager path.
mode_depth: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
TABLE_LIMIT = 4096  # entries; reached only by facts about derived sizes, whose key is raw shapes
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


def build(
    spec: Spec, facts: Collection[Fact], context: Callable[[], Any], other: Callable[..., Any]
) -> tuple[Callable[..., Any], Callable[..., tuple[Any, ...]], dict[tuple[Any, ...], Any]]:
    """Return (run, key, table).

    ``run`` takes all arguments by position, looks their key up in *table* and calls what it finds;
    otherwise, and for tensor subclasses or under dispatch modes, it calls *other*.
    """
    hoisted, parts = key_parts(spec, facts)
    table: dict[tuple[Any, ...], Any] = {}
    names: dict[str, Any] = {
        "_get": table.get,
        "_context": context,
        "_other": other,
        "_modes": mode_depth,
        "_grad": torch.is_grad_enabled,
        "_current": _current_device,
    }
    names |= {"Tensor": Tensor, "Parameter": Parameter, **DTYPES, **PREDICATES}
    by_position = ", ".join(spec.parameters)
    split = len(spec.positional)
    call = ", ".join([*spec.parameters[:split], *(f"{p}={p}" for p in spec.parameters[split:])])
    plain = " and ".join(f"(type({t}) is Tensor or type({t}) is Parameter)" for t in spec.tensors)
    hoist = "; ".join(sorted(hoisted)) or "pass"
    key = f"({', '.join(parts)},)"
    source = f"""
def key({by_position}):
    {hoist}
    return {key}
def run({by_position}):
    if {plain} and not {spec.tensors[0]}.is_meta and not _modes():
        try:
            {hoist}
            _found = _get({key})
        except Exception:  # wrong input or a bug in a fact: the cold path raises it by name
            _found = None
        if _found is not None:
            return _found({call})
    return _other({by_position})
"""
    exec(compile(source, f"<guard of {spec.name}>", "exec"), names)  # noqa: S102
    return names["run"], names["key"], table


def key_parts(spec: Spec, facts: Collection[Fact]) -> tuple[set[str], list[str]]:
    """Return the statements that hoist shapes and strides, and the expressions of the memo key."""
    gradients = " or ".join(f"{t}.requires_grad" for t in spec.tensors)
    parts = ["_context()", f"{spec.tensors[0]}.get_device()", f"_grad() and ({gradients})"]
    if "dtype" in spec.parameters:
        parts.append("dtype")
    if torch.cuda.is_available() and torch.cuda.device_count() > 1:
        parts.append(f"{spec.tensors[0]}.is_cuda and _current()")  # a CPU call leaves CUDA alone
    hoisted: set[str] = set()
    if facts:
        from hwfuse import _fact_keys

        hoisted, fact_parts = _fact_keys.key_parts(spec, facts)
        parts += fact_parts
    return hoisted, list(dict.fromkeys(parts))


def entrance(spec: Spec, traced: Callable[[], bool]) -> Callable[..., Any]:
    """Return the op's ``__call__``: one torch node under tracing, the guard otherwise.

    It never changes, so compiled code, which guards on it, never recompiles because a policy did.
    """
    split = len(spec.positional)
    parameters = []
    for index, p in enumerate(spec.signature.parameters.values()):
        if index == split:
            parameters.append("*")
        default = "" if p.default is p.empty else f"=_default_{p.name}"
        parameters.append(p.name + default)
    defaults = {f"_default_{p.name}": p.default for p in spec.signature.parameters.values()}
    by_name = [*spec.parameters[:split], *(f"{p}={p}" for p in spec.parameters[split:])]
    resolve = "pass"
    if "dtype" in spec.parameters:
        resolve = f"dtype = fp8_dtype({spec.tensors[0]}.device) if dtype is None else dtype"
    source = f"""
def __call__(self, {", ".join(parameters)}):
    if traced():
        {resolve}
        return ops.hwfuse.{spec.name}.default({", ".join(by_name)})
    return self._run({", ".join(spec.parameters)})
"""
    names: dict[str, Any] = {"traced": traced, "ops": torch.ops, "fp8_dtype": fp8_dtype, **defaults}
    exec(compile(source, f"<call of {spec.name}>", "exec"), names)  # noqa: S102
    function: Callable[..., Any] = names["__call__"]
    function.__doc__ = spec.function.__doc__
    return function

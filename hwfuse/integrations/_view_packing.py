"""Linears that read the same input, computed as one GEMM, with their weights where they were.

The weights of a pack move into one tensor and become views of its rows.  The parameters stay the
same objects under the same names, so state dict, saving, loading and optimisers do not notice, and
no memory is added.  What gives a parameter other memory (``model.to(dtype)``, a deep copy) breaks
the pack: that is noticed by the storage pointers, and it is packed again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hwfuse.integrations._rewrite import rule_of

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Attribute of the module that will hold the pack, and the linears in the order of the rows.
Packs = Mapping[str, Sequence[nn.Linear]]


class _Pack(NamedTuple):
    """One GEMM's weight, and the parameters that are views of it."""

    weight: Tensor
    sources: tuple[Tensor, ...]


def obstacle(packs: Packs) -> str | None:
    """Say why linears of these packs must be called one by one, or None.

    Adapters, quantised weights, offloading and tensor parallelism each replace the class, the
    forward or the weight, or hook into the call.
    """
    for linears in packs.values():
        for linear in linears:
            if type(linear) is not nn.Linear:
                return f"one of its linears is a {type(linear).__name__}"
            if found := interception(linear):
                return f"one of its linears has {found}"
            if linear.bias is not None:
                return "one of its linears has a bias"
            if found := _difference(linear.weight, linears[0].weight):
                return found
    return None


def _difference(weight: Tensor, first: Tensor) -> str | None:
    """Say why two weights cannot be rows of one tensor, or None."""
    if type(weight) is not nn.Parameter:
        return f"the weight of one of its linears is a {type(weight).__name__}"
    if weight.dtype not in _DTYPES or weight.dtype != first.dtype:
        return f"the weights of its linears are {first.dtype} and {weight.dtype}"
    if weight.device != first.device:
        return f"the weights of its linears lie on {first.device} and {weight.device}"
    return None


def interception(module: nn.Module) -> str | None:
    """Say what would be left out if the work of *module* were done without calling it, or None."""
    if "forward" in module.__dict__:
        return "a forward of its own"
    if module._forward_hooks or module._forward_pre_hooks:
        return "a forward hook"
    if module._backward_hooks or module._backward_pre_hooks:
        return "a backward hook"
    return None


def pack(module: Any, packs: Packs) -> None:
    """Move the weights of each pack into one tensor, unless they are there already."""
    for name, linears in packs.items():
        found: _Pack | None = getattr(module, name, None)
        if found is None or not _serves(found, linears) or not _is_intact(module, name):
            vars(module).pop(name, None)
            if not obstacle({name: linears}) and _is_movable(linears[0].weight):
                setattr(module, name, _pack([linear.weight for linear in linears]))


def pack_again(module: Any) -> None:
    """Pack a patched module as it was asked for; others are left alone."""
    rule = rule_of(module)
    if rule and module.hwfuse_pack != "never":
        pack(module, rule.packs(module))


def unpack(module: Any, packs: Packs) -> None:
    """Give each weight memory of its own again."""
    for name in packs:
        found: _Pack | None = vars(module).pop(name, None)
        for source in found.sources if found else ():
            source.data = source.data.clone()


def packed_weights(module: Any, packs: Packs, x: Tensor) -> list[Tensor] | None:
    """Return the weight of each pack, or None: then the module's own linears must be called on x.

    Parameters that have other memory than before are packed again.  Other parameters are not:
    sharded training swaps its own in and out, and their memory is not ours.
    """
    if module.hwfuse_pack == "never" or torch.is_autocast_enabled(x.device.type):
        return None
    weights = []
    for name, linears in packs.items():
        found: _Pack | None = getattr(module, name, None)
        if found is None or not _serves(found, linears):
            return None
        if not _is_intact(module, name):
            if torch.compiler.is_compiling():
                return None  # a graph cannot move parameters
            pack(module, packs)
            found = getattr(module, name)
        weights.append(_with_gradient(found) if torch.is_grad_enabled() else found.weight)
    return weights


def what_is_not_packed(module: Any, packs: Packs) -> str | None:
    """Say why a patched module calls its own linears, or None: it does not."""
    if found := obstacle(packs):
        return found
    for name, linears in packs.items():
        known: _Pack | None = getattr(module, name, None)
        if not linears[0].weight.is_meta and (known is None or not _serves(known, linears)):
            return "its parameters are not those that were packed; patch again packs them"
    return None


def _serves(found: _Pack, linears: Sequence[nn.Linear]) -> bool:
    """Tell whether calling the linears would do nothing but multiply by the parameters packed.

    This is `obstacle` without words, for every call; compiled code guards on what it looks at.
    """
    for linear, source in zip(linears, found.sources, strict=True):
        parameters = linear._parameters  # noqa: SLF001 - five times as fast as the attributes
        if (
            type(linear) is not nn.Linear
            or "forward" in linear.__dict__
            or linear._forward_hooks
            or linear._forward_pre_hooks
            or linear._backward_hooks
            or linear._backward_pre_hooks
            or parameters["weight"] is not source
            or parameters["bias"] is not None
        ):
            return False
    return True


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_intact(module: Any, name: str) -> bool:
    """Tell whether those parameters still are views of the pack; asked once for a graph."""
    found: _Pack = getattr(module, name)
    address = found.weight.data_ptr()
    for source in found.sources:
        if source.data_ptr() != address:
            return False
        address += source.nbytes
    return True


def _with_gradient(found: _Pack) -> Tensor:
    if any(source.requires_grad for source in found.sources):
        joined: Tensor = _Rows.apply(found.weight, *found.sources)  # type: ignore[no-untyped-call]
        return joined
    return found.weight


def _is_movable(weight: Tensor) -> bool:
    return not weight.is_meta and not weight.is_inference()


def _pack(sources: list[Tensor]) -> _Pack:
    with torch.inference_mode(mode=False), torch.no_grad():
        weight = torch.cat(sources)
        for source, rows in zip(sources, weight.split([len(s) for s in sources]), strict=True):
            source.data = rows
    return _Pack(weight, tuple(sources))


class _Rows(torch.autograd.Function):
    """The packed weight as a function of the parameters that are its rows, without a copy."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, *sources: Tensor) -> Tensor:
        ctx.rows = [len(source) for source in sources]
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, *gradient.split(ctx.rows)


def _apply(
    self: Any,
    fn: Callable[[Tensor], Tensor],
    recurse: bool = True,  # noqa: FBT001, FBT002 - nn.Module's own
) -> Any:
    """Pack again after ``.to``, ``.cuda``, ``.half`` … have moved each weight by itself."""
    self._hwfuse_stock._apply(self, fn, recurse)
    pack_again(self)
    return self


def __getstate__(self: Any) -> dict[str, Any]:  # noqa: N807 - a method of a rewritten class
    """Leave the packs out: a copy or pickle gives each weight memory of its own."""
    state = self._hwfuse_stock.__getstate__(self)
    return {name: value for name, value in state.items() if not isinstance(value, _Pack)}


def __setstate__(self: Any, state: dict[str, Any]) -> None:  # noqa: N807 - as above
    self._hwfuse_stock.__setstate__(self, state)
    pack_again(self)


# What a rewritten class with packs needs among its methods.
METHODS = (_apply, __getstate__, __setstate__)

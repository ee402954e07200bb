"""`hwfuse.explain`: the decision for a call that is not made."""

from __future__ import annotations

import re
from typing import Any

import torch

from hwfuse import _device, _op, _variants
from hwfuse._decision import Decision
from hwfuse._device import Target
from hwfuse._errors import InputError
from hwfuse._spec import Spec


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
    this = _op.op(name)
    if args or set(kwargs) & set(this.spec.tensors):
        if device is not None:
            raise InputError("device", repr(device), "none beside tensors, which lie on one")
        decision, _, call = this.decide(this.spec.bind(args, kwargs))
        return _variants.added(decision, call)
    here = _here(device)
    target = here or _device.parse(str(device))
    pretended = here is None or here == _device.pretended.get()
    token = _device.pretended.set(target)
    try:
        arguments = inputs(this.spec, device="meta", **kwargs)
        decision, _, call = this.decide(
            arguments, target=target, absent=here is None, pretended=pretended
        )
        return _variants.added(decision, call)
    finally:
        _device.pretended.reset(token)


def inputs(spec: Spec, **keywords: Any) -> dict[str, Any]:
    """Call the spec's `make_inputs`; all arguments by name, defaults filled in."""
    try:
        args, kwargs = spec.split(spec.make_inputs(**keywords))
    except (TypeError, RuntimeError, ArithmeticError) as error:
        needed = "its own keywords, with sizes that fit each other"
        raise InputError(f"{spec.name}.make_inputs", error, needed) from error
    return spec.bind(args, kwargs)


def _here(device: str | None) -> Target | None:
    """Return what a device of this machine is, by default its accelerator; None for other words."""
    if device == "cpu":
        return _device.parse(device)
    if device is None:
        device = "cuda" if torch.cuda.is_available() and not _device.pretended.get() else "cpu"
    elif re.fullmatch(r"cuda(:\d+)?", device) is None:
        return None
    elif not torch.cuda.is_available():
        raise InputError("device", f"{device!r}, but no GPU", "'cuda:sm90' or 'rocm:gfx950' style")
    return _device.target_of(torch.device(device))

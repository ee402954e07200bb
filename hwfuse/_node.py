"""The neutral torch node of an op: what tracing, export and dispatch modes see.

One ``torch.ops.hwfuse.<op>`` per op; the implementation is chosen when the node runs, by the same
code as in eager mode, so no choice and no size is frozen into a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from hwfuse._spec import Spec

_library = Library("hwfuse", "FRAGMENT")
_TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)


def define(
    spec: Spec, run: Callable[..., Any], reference: Callable[[], Callable[..., Any] | None]
) -> None:
    """Register the op with torch.

    Args:
        spec: The op.
        run: Chooses and runs, by keyword; called when the node runs.
        reference: Returns the reference function if its autograd may be used, else None.
    """
    name = f"hwfuse::{spec.name}"
    _library.define(spec.name + spec.schema, tags=_TAGS)
    _library.impl(spec.name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(name, spec.outputs, lib=_library)
    overload = getattr(torch.ops.hwfuse, spec.name).default
    if spec.mutates:
        _library.impl(spec.name, _refuse_gradient(spec, overload), "Autograd", with_keyset=False)
    else:
        torch.library.register_autograd(
            name, _backward(spec, reference), setup_context=_setup_context, lib=_library
        )


def _refuse_gradient(spec: Spec, overload: Any) -> Callable[..., Any]:
    def autograd(*args: Any, **kwargs: Any) -> Any:
        tensors = (value for value in args if isinstance(value, Tensor))
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            raise NotImplementedError(
                f"{spec.name} writes into its inputs and has no gradient; "
                f"use {spec.name.rstrip('_')}, or torch.no_grad()"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args, **kwargs)

    return autograd


def _setup_context(
    ctx: Any,
    inputs: tuple[Any, ...],
    output: Any,  # noqa: ARG001
    keyword_only_inputs: dict[str, Any] | None = None,  # left out where an op has none
) -> None:
    ctx.save_for_backward(*inputs)
    ctx.keywords = keyword_only_inputs or {}


def _backward(spec: Spec, reference: Callable[[], Callable[..., Any] | None]) -> Callable[..., Any]:
    """Return the gradient: the reference's own autograd on recomputed outputs."""

    def backward(ctx: Any, *gradients: Any) -> Any:
        function = reference()
        if function is None:
            raise NotImplementedError(f"{spec.name} has no gradient: it is for inference only")
        twice = torch.is_grad_enabled()  # create_graph: this gradient will be differentiated too
        needs = ctx.needs_input_grad
        inputs = [
            t.view_as(t) if twice else t.detach().requires_grad_(need)
            for t, need in zip(ctx.saved_tensors, needs, strict=False)
        ]
        with torch.enable_grad():
            outputs = function(*inputs, **ctx.keywords)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        both = zip(outputs, gradients, strict=True)
        pairs = [(o, g) for o, g in both if o.requires_grad and g is not None]
        used, seeds = [o for o, _ in pairs], [g for _, g in pairs]
        wanted = [t for t, need in zip(inputs, needs, strict=False) if need]
        found = torch.autograd.grad(used, wanted, seeds, create_graph=twice, allow_unused=True)
        answers = iter(found)
        return tuple(next(answers) if need else None for need in needs)

    return backward


def telling_autograd(function: Callable[..., Any], spec: Spec) -> Callable[..., Any]:
    """Wrap an in-place kernel: autograd must notice if it overwrote a tensor saved for backward."""
    indices = [spec.parameters.index(name) for name in spec.mutates]

    def call(*args: Any, **kwargs: Any) -> None:
        function(*args, **kwargs)
        torch.autograd.graph.increment_version([args[index] for index in indices])

    return call

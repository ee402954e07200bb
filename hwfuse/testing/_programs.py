"""Checks of an op as torch sees it: compiled, exported, its registration, its gradient."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import hwfuse
from hwfuse._implementation import REFERENCE
from hwfuse.testing._cases import SEED, Case, NotTaken
from hwfuse.testing._memory import Memory
from hwfuse.testing._values import (
    Arguments,
    Results,
    by_name,
    calls_of,
    compare_all,
    pinned_results,
    reference_results,
    require_taken,
    resolved,
    run_reference,
)
from hwfuse.testing.compare import bitwise, rel_frobenius

_TRACED, _RUN = 5, 9  # rows while tracing, and rows of a later call


class _Program(torch.nn.Module):
    """A model that is one call of the op; its options are constants."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.op = hwfuse.op(case.op)
        tensors = case.spec.tensors
        self.options = {k: v for k, v in case.arguments().items() if k not in tensors}

    def forward(self, *tensors: Tensor) -> Any:
        return self.op(*tensors, **self.options)


def check_compiled(case: Case) -> None:
    """Compile once for any number of rows; eager and compiled results agree bit for bit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's, of torch, when it loads
        _check_compiled(case)


def _check_compiled(case: Case) -> None:
    from torch import _dynamo

    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return _dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch.compiler.reset()
    compiled = torch.compile(_Program(case), backend=backend, fullgraph=True)
    for num_rows in (_TRACED, _RUN):
        arguments, expected = _eager(case, num_rows)
        for name, i in _row_dimensions(case):
            _dynamo.mark_dynamic(arguments[name], i)
        _check_equal(case, compiled, arguments, expected, f"compiled, m={num_rows}")
    if len(graphs) != 1:
        raise case.error(f"compiled {len(graphs)} graphs for two numbers of rows, needed 1")


def check_exported(case: Case) -> None:
    """Export with a dynamic number of rows and run at another one."""
    arguments, _ = _eager(case, _TRACED)
    dynamic: dict[str, dict[int, Any]] = {name: {} for name in case.spec.tensors}
    for name, i in _row_dimensions(case):
        dynamic[name][i] = torch.export.Dim("m")
    tensors = tuple(arguments[name] for name in case.spec.tensors)
    shapes = (tuple(dynamic.values()),)
    program = torch.export.export(_Program(case), tensors, dynamic_shapes=shapes).module()
    arguments, expected = _eager(case, _RUN)
    _check_equal(case, program, arguments, expected, f"exported, m={_RUN}")


def check_registration(case: Case) -> None:
    """Apply torch's opcheck: schema, autograd registration, fake kernel, all sizes symbolic."""
    arguments = resolved(case.arguments(m=2))  # few: torch's comparison here knows no NaN
    tests = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if all(arguments[name].element_size() > 1 for name in case.spec.tensors):
        # It multiplies the inputs, which fp8 cannot.  What it looks for, an input that is written
        # or returned, check_values looks for too.
        tests.append("test_schema")
    if case.record.requires.differentiable:
        for name in _float_tensors(case, arguments):
            arguments[name].requires_grad_()
    args, kwargs = case.spec.split(arguments)
    with case.pinned():
        torch.library.opcheck(hwfuse.op(case.op).node, args, kwargs, test_utils=tests)


def check_gradient(case: Case) -> None:
    """Compare the gradients of a differentiable implementation with the reference's autograd.

    In eager mode and through the torch node.  The reference's own is compared with differences.
    """
    with case.place.entered():
        arguments = case.arguments()
        require_taken(case, arguments)
        floats = _float_tensors(case, arguments)
        exact = {**arguments, **{name: arguments[name].float() for name in floats}}
        found = _gradients(case, exact, floats, pinned_results)
        traced = _gradients(case, exact, floats, _run_node)
        wanted = _gradients(case, exact, floats, run_reference)
        for name in floats:
            for what, gradient in (("", found[name]), (" through the node", traced[name])):
                if text := rel_frobenius(gradient, wanted[name], bound=1e-5):
                    raise case.error(f"gradient of {name}{what}: {text}")
        if case.implementation == REFERENCE:
            _check_slopes(case, exact, wanted)


def check_no_gradient(case: Case) -> None:
    """Call with inputs that need a gradient: it works, and backward raises and names the op."""
    arguments = case.arguments()
    leaves = {n: arguments[n].clone().requires_grad_() for n in _float_tensors(case, arguments)}
    if not leaves:
        raise NotTaken("no argument can need a gradient")
    args, kwargs = case.spec.split({**arguments, **leaves})
    try:
        result = hwfuse.op(case.op)(*args, **kwargs)
        outputs = [result] if isinstance(result, Tensor) else list(result)
        torch.stack([x.float().sum() for x in outputs if x.requires_grad]).sum().backward()
    except NotImplementedError as error:
        if case.op not in str(error):
            raise case.error(f"its gradient is refused without its name: {error}") from error
        return
    raise case.error("no gradient is declared, and backward gave one")


def check_replayed(case: Case) -> None:
    """Capture the call in a CUDA graph, put other inputs into its memory, and replay."""
    arguments, others = case.arguments(), case.arguments(seed=SEED + 1)
    require_taken(case, arguments)
    expected = reference_results(case, others)
    args, kwargs = case.spec.split(arguments)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with warnings.catch_warnings(), torch.no_grad(), case.pinned():
        warnings.simplefilter("ignore", UserWarning)  # that no rows make an empty graph
        with torch.cuda.stream(stream):
            for _ in range(4):  # the first compiles, the second is recorded, then it is replayed
                hwfuse.op(case.op)(*args, **kwargs)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            result = hwfuse.op(case.op)(*args, **kwargs)
    for name in case.spec.tensors:
        arguments[name].copy_(others[name])
    graph.replay()
    torch.cuda.synchronize()
    if text := compare_all(case, by_name(case, result, arguments), expected, others):
        raise case.error(f"replayed in a CUDA graph on other inputs: {text}")


def check_compiled_here(case: Case) -> None:
    """Compiled code on a GPU runs the pinned implementation, and its results are as right."""
    arguments = case.arguments()
    require_taken(case, arguments)
    expected = reference_results(case, arguments)
    torch.compiler.reset()
    compiled = torch.compile(_Program(case), backend="aot_eager", fullgraph=True)
    with warnings.catch_warnings(), torch.no_grad(), case.pinned(), calls_of(case.op) as ran:
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's, of torch, when it loads
        result = compiled(*(arguments[name] for name in case.spec.tensors))
    if ran[case.implementation] != 1:
        raise case.error(f"compiled code ran {dict(ran)}")
    if text := compare_all(case, by_name(case, result, arguments), expected, arguments):
        raise case.error(f"compiled: {text}")


def _check_slopes(case: Case, arguments: Arguments, gradients: Results) -> None:
    """Compare with what the outputs do when the inputs move a little: no autograd here."""
    generator = torch.Generator().manual_seed(1)
    for name, gradient in gradients.items():
        x = arguments[name]
        step = torch.randn(x.shape, generator=generator).to(x.device) * x.abs().clamp(min=1e-3) / 64
        high = _loss(reference_results(case, {**arguments, name: x + step}))
        low = _loss(reference_results(case, {**arguments, name: x - step}))
        parts = gradient.double() * step
        slope, wanted = float(parts.sum()), float(high - low) / 2
        if abs(slope - wanted) > 1e-2 * float(parts.norm()):
            raise case.error(f"gradient of {name}: slope {slope:.6g}, differences {wanted:.6g}")


def _gradients(
    case: Case,
    arguments: Arguments,
    names: list[str],
    function: Callable[[Case, Arguments], Results],
) -> Results:
    leaves = {name: arguments[name].detach().clone().requires_grad_() for name in names}
    loss = _loss(function(case, {**arguments, **leaves}))
    return dict(zip(names, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def _loss(results: Results) -> Tensor:
    """Weigh every element with another number: a gradient in the wrong place shows."""
    generator = torch.Generator().manual_seed(2)
    terms = []
    for x in results.values():
        weights = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        terms.append((x.double() * weights.to(x.device)).sum())
    return torch.stack(terms).sum()


def _run_node(case: Case, arguments: Arguments) -> Results:
    args, kwargs = case.spec.split(resolved(arguments))
    with case.pinned():
        return by_name(case, hwfuse.op(case.op).node(*args, **kwargs), arguments)


def _eager(case: Case, num_rows: int) -> tuple[dict[str, Any], Results]:
    """Return a call's arguments and what the op gives in eager mode for a copy of them."""
    arguments = case.arguments(m=num_rows)
    return arguments, pinned_results(case, Memory(arguments).arguments)


def _row_dimensions(case: Case) -> list[tuple[str, int]]:
    return [(name, dims.index("m")) for name, dims in case.spec.dims.items() if "m" in dims]


def _float_tensors(case: Case, arguments: Mapping[str, Any]) -> list[str]:
    return [name for name in case.spec.tensors if arguments[name].is_floating_point()]


def _check_equal(
    case: Case, function: Callable[..., Any], arguments: Arguments, expected: Results, what: str
) -> None:
    with case.pinned():
        result = function(*(arguments[name] for name in case.spec.tensors))
    for name, found in by_name(case, result, arguments).items():
        wanted = expected[name]
        if (found.dtype, found.shape) != (wanted.dtype, wanted.shape):
            forms = " instead of ".join(f"{x.dtype} {tuple(x.shape)}" for x in (found, wanted))
            raise case.error(f"{what}: {name} is {forms}")
        if not case.spec.mutates and found.stride() != wanted.stride():
            raise case.error(f"{what}: strides of {name}: {found.stride()}, not {wanted.stride()}")
        if text := bitwise(found, wanted):
            raise case.error(f"{what}: {name}: {text}")

"""Checks of what an implementation does with one call: who ran, form, memory, values, traits."""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch import Tensor

import hwfuse
from hwfuse import _state, layouts
from hwfuse._implementation import REFERENCE
from hwfuse.testing._cases import Case, NotTaken
from hwfuse.testing._memory import Memory, poisoned, wider_rows
from hwfuse.testing.compare import bitwise, compare, valid_rows

Arguments = Mapping[str, Any]
Results = dict[str, Tensor]


def check_values(case: Case) -> None:
    """Run on the inputs as they are and with their rows further apart; check everything."""
    with case.place.entered():
        arguments = case.arguments()
        require_taken(case, arguments)
        expected = reference_results(case, arguments)
        _check_call(case, arguments, expected)
        if wide := _with_wider_rows(case, arguments):
            names = ", ".join(wide)
            _check_call(case, {**arguments, **wide}, expected, f"; rows further apart in {names}")


def _check_call(case: Case, arguments: Arguments, expected: Results, what: str = "") -> None:
    """Call in poisoned memory and check who ran, the outputs' form, memory and values."""
    memory = Memory(arguments)
    with poisoned():
        found = pinned_results(case, memory.arguments)
    text = (
        (None if case.spec.mutates else _check_form(case, found, memory))
        or memory.written(case.spec.mutates)
        or compare_all(case, found, expected, memory.arguments)
    )
    if text:
        raise case.error(text + what)


def check_traits(case: Case) -> None:
    """Run on plain memory, which may take other paths than poisoned one, and prove the traits."""
    requires = case.record.requires
    with case.place.entered():
        arguments = case.arguments()
        require_taken(case, arguments)
        first = pinned_results(case, Memory(arguments).arguments)
        if text := compare_all(case, first, reference_results(case, arguments), arguments):
            raise case.error(text)
        for _ in range(2 if requires.deterministic else 0):
            for name, again in pinned_results(case, Memory(arguments).arguments).items():
                used = arguments.get(case.spec.compare[name][1].get("valid_rows", ""))
                if text := bitwise(valid_rows(again, used), valid_rows(first[name], used)):
                    raise case.error(f"deterministic is declared; {name} of two runs: {text}")
        if requires.batch_invariant:
            _check_batch_invariant(case, arguments, first)


def _check_batch_invariant(case: Case, arguments: Arguments, batch: Results) -> None:
    by_rows = [name for name, dims in case.spec.dims.items() if dims[0] == "m"]
    num_rows = arguments[by_rows[0]].shape[0]
    for i in (0, num_rows // 2, num_rows - 1):
        alone = {**arguments, **{name: arguments[name][i : i + 1] for name in by_rows}}
        require_taken(case, alone)
        for name, found in pinned_results(case, Memory(alone).arguments).items():
            lengths = list(zip(batch[name].shape, found.shape, strict=True))
            if (num_rows, 1) not in lengths:
                raise case.error(f"batch_invariant is declared, but {name} has no rows")
            row = batch[name].narrow(lengths.index((num_rows, 1)), i, 1)
            if text := bitwise(found, row):
                raise case.error(f"batch_invariant is declared; {name} of row {i} alone: {text}")


def decide(case: Case, arguments: Arguments) -> hwfuse.Decision:
    """Return the decision with the implementation pinned."""
    args, kwargs = case.spec.split(arguments)
    with case.pinned():
        return hwfuse.explain(case.op, *args, **kwargs)


def require_taken(case: Case, arguments: Arguments) -> None:
    """Raise `NotTaken` with the reasons if the implementation rejects the call."""
    decision = decide(case, arguments)
    if decision.chosen != case.implementation:
        raise NotTaken("; ".join(decision.rejected[case.implementation]))


def pinned_results(case: Case, arguments: Arguments) -> Results:
    """Call the op with the implementation pinned and prove that it ran, once, and no other."""
    args, kwargs = case.spec.split(arguments)
    with calls_of(case.op) as ran, case.pinned():
        try:
            result = hwfuse.op(case.op)(*args, **kwargs)
        except Exception as error:
            raise case.error(f"raised {type(error).__name__}: {error}") from error
    if ran != {case.implementation: 1}:
        what = ", ".join(f"{name} ran {count} times" for name, count in ran.items())
        text = f"{case.implementation} was pinned and must run once, alone"
        raise case.error(f"{text}; {what or 'no implementation ran'}")
    return by_name(case, result, arguments)


def reference_results(case: Case, arguments: Arguments) -> Results:
    """Run the reference on a copy of the arguments."""
    return run_reference(case, Memory(arguments).arguments)


def run_reference(case: Case, arguments: Arguments) -> Results:
    """Run the reference itself, past all selection."""
    args, kwargs = case.spec.split(resolved(arguments))
    reference = _state.registry().implementations(case.op)[REFERENCE].load()
    return by_name(case, reference(*args, **kwargs), arguments)


def resolved(arguments: Arguments) -> dict[str, Any]:
    """Fill in what dtype=None means here, as a call of the op does."""
    if "dtype" not in arguments or arguments["dtype"] is not None:
        return dict(arguments)
    first = next(value for value in arguments.values() if isinstance(value, Tensor))
    return {**arguments, "dtype": hwfuse.fp8_dtype(first.device)}


def by_name(case: Case, result: Any, arguments: Arguments) -> Results:
    """Return the outputs by name: the results, or the arguments that the op writes into."""
    names = tuple(case.spec.compare)
    if case.spec.mutates:
        return {name: arguments[name] for name in names}
    values = (result,) if len(names) == 1 else tuple(result)
    if len(values) != len(names) or not all(isinstance(value, Tensor) for value in values):
        kinds = ", ".join(type(value).__name__ for value in values)
        raise case.error(f"returned ({kinds}), needed tensors {', '.join(names)}")
    return dict(zip(names, values, strict=True))


def _check_form(case: Case, found: Results, memory: Memory) -> str | None:
    """Compare dtype, shape and strides with what the spec allocates; refuse shared memory."""
    form = case.spec.outputs(**resolved(memory.arguments))
    layout = memory.arguments.get("scale_layout")
    owners: dict[int, str] = memory.owners()
    for (name, x), y in zip(found.items(), form if len(found) > 1 else (form,), strict=True):
        for what in ("dtype", "shape", "device"):
            if getattr(x, what) != getattr(y, what):
                return f"{name}.{what} is {getattr(x, what)}, needed {getattr(y, what)}"
        # The stride of a dimension of size 1 addresses nothing, and an empty tensor has nothing.
        used = [i for i in range(x.ndim) if x.shape[i] > 1] if x.numel() else []
        if any(x.stride(i) != y.stride(i) for i in used):
            return f"strides of {name} {tuple(x.shape)} are {x.stride()}, needed {y.stride()}"
        if layout and name == "scale" and not layouts.matches(x, layout):
            return f"strides of {name} {tuple(x.shape)} are {x.stride()}: not {layout!r}"
        address = x.untyped_storage().data_ptr()
        if address in owners:
            return f"output {name} shares memory with {owners[address]}"
        if address:
            owners[address] = f"output {name}"
    return None


def compare_all(case: Case, found: Results, expected: Results, arguments: Arguments) -> str | None:
    """Compare every output as the op's COMPARE says."""
    others = {**arguments, **found}
    for name, comparator in case.spec.compare.items():
        if text := compare(comparator, found[name], expected[name], others):
            return f"output {name}: {text}"
    return None


def _with_wider_rows(case: Case, arguments: Arguments) -> dict[str, Tensor]:
    """Move the rows of each tensor apart: oddly if the implementation takes it, else evenly."""
    wide: dict[str, Tensor] = {}
    for name in case.spec.tensors:
        for extra in (3, 64):
            tensor = wider_rows(arguments[name], extra)
            if tensor is not None and _takes(case, {**arguments, **wide, name: tensor}):
                wide[name] = tensor
                break
    return wide


def _takes(case: Case, arguments: Arguments) -> bool:
    try:
        return decide(case, arguments).chosen == case.implementation
    except hwfuse.InputError:
        return False


@contextmanager
def calls_of(op: str) -> Iterator[Counter[str]]:
    """Count the calls of the op's implementations in this block, however they are reached.

    By their code, not by a wrapper: an implementation that imports another one, to call it as its
    own fallback, is seen too.
    """
    counts: Counter[str] = Counter()
    files: dict[str, str] = {}
    codes: dict[int, str] = {}
    for identifier, found in _state.registry().implementations(op).items():
        if found.path is not None:
            files[str(found.path)] = identifier
        elif found.function is not None:
            codes[id(inspect.unwrap(found.function).__code__)] = identifier

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            code = frame.f_code
            found = codes.get(id(code))
            if code.co_name == op:
                found = found or files.get(code.co_filename)
            if found:
                counts[found] += 1

    with _not_replayed(op):
        before = sys.getprofile()
        sys.setprofile(profile)
        try:
            yield counts
        finally:
            sys.setprofile(before)


@contextmanager
def _not_replayed(op: str) -> Iterator[None]:
    """Let each call run its function, also where a repeated one would be replayed without it."""
    found = _state.registry().implementations(op).values()
    replayed = {one: one.function for one in found if hasattr(one.function, "replays")}
    try:
        for one, function in replayed.items():
            one.function = inspect.unwrap(function)  # type: ignore[arg-type]  # not None
            _state.forget()
        yield
    finally:
        for one, function in replayed.items():
            one.function = function
            _state.forget()

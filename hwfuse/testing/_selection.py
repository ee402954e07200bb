"""Checks of selection, on meta tensors or empty ones: nothing is computed.

Each statement of REQUIRES is broken once, and the call must be refused with that reason.  And each
implementation must be what some call of the matrix gets.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import hwfuse
from hwfuse import InputError, PinnedUnavailable, _explain, _op, _policy, _select, _state
from hwfuse._facts import Fact
from hwfuse._implementation import REFERENCE
from hwfuse._policy import Order
from hwfuse.testing import _matrix
from hwfuse.testing._cases import Case, Place
from hwfuse.testing._memory import wider_rows
from hwfuse.testing._values import Arguments, decide

_DTYPES = (
    torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn,
    torch.float8_e4m3fnuz, torch.float8_e5m2, torch.int8, torch.uint8, torch.int32, torch.int64,
)  # fmt: skip
_ARCHES = {"nvidia": ("cuda:sm80", "cuda:sm90"), "amd": ("rocm:gfx90a", "rocm:gfx942")}


def check_rejections(
    case: Case, combinations: Iterable[Mapping[str, Any]], implied: tuple[str, ...]
) -> None:
    """Break the arch, and each fact by some input that the op itself takes."""
    requires = case.record.requires
    unbroken = {fact.source: fact for fact in requires.facts if fact.source not in implied}
    with case.place.on_meta():
        for keywords in combinations:
            for fact in list(unbroken.values()):
                for arguments in _variants(case, dict(keywords), fact):
                    if reason := _reason(case, arguments, fact):
                        _check_refused(case, arguments, reason)
                        del unbroken[fact.source]
                        break
    if unbroken:
        raise case.error(
            f"no input was found that breaks {' or '.join(map(repr, unbroken))}; drop the fact "
            "if the op's own checks imply it, or list it in row(implied=…); otherwise give the row "
            "values that break it"
        )
    others = _ARCHES.get(case.record.vendor or "", ())
    other = [target for target in others if target.partition(":")[2] not in requires.arch]
    if requires.arch and other:
        with Place(other[0], "cpu").on_meta():
            reason = f"needs arch in {', '.join(requires.arch)}; found "
            _check_refused(case, case.arguments("meta"), reason)


def check_reached(case: Case, combinations: Iterable[Mapping[str, Any]]) -> str | None:
    """Fail if no input is taken: then nothing was checked.

    Returns:
        A note if no input gets this implementation unless it is asked for.
    """
    built_in = _policy.BUILT_IN.ops["*"].order
    assert built_in is not None
    reasons, winners, is_taken = Counter[str](), Counter[str](), False
    for keywords in combinations:
        with case.place.on_meta():
            arguments = _explain.inputs(case.spec, device="meta", **keywords)
            decision = decide(case, arguments)
            call = _op.make_call(case.spec, arguments)
            order = _without_rivals(case, _select.ranking(call, built_in, _state.registry()))
            winners[_select.select(call, order, _state.registry()).chosen] += 1
        is_taken |= decision.chosen == case.implementation
        reasons.update(decision.rejected.get(case.implementation, ()))
    if not is_taken:
        raise case.error(f"takes no input of the matrix: {reasons.most_common(1)[0][0]}")
    is_meant = case.implementation == REFERENCE or case.record.requires.experimental
    if is_meant or case.implementation in winners:
        return None
    return f"every call gets {' or '.join(winners)}"


def _without_rivals(case: Case, ranked: Iterable[str]) -> Order:
    """Leave out those that need packages beyond the implementation's: a machine may lack them."""
    found = _state.registry().implementations(case.op)
    has = set(case.record.requires.packages)
    ids = (i for i in ranked if i in found and not set(found[i].requires.packages) - has)
    usual = tuple(i for i in ids if not found[i].requires.experimental)
    return Order(usual, pin=False, origin="built-in")


def _reason(case: Case, arguments: Arguments, fact: Fact) -> str | None:
    """Return the start of the reason that names the fact, if the call breaks it."""
    try:
        reasons = decide(case, arguments).rejected.get(case.implementation, ())
    except InputError:
        return None  # the op itself refuses the call
    start = f"needs {fact.source}; found "
    return start if any(reason.startswith(start) for reason in reasons) else None


def _check_refused(case: Case, arguments: Arguments, reason: str) -> None:
    """Make the call: it must raise and say why, before anything of the implementation runs."""
    args, kwargs = case.spec.split({name: _on_cpu(value) for name, value in arguments.items()})
    try:
        with case.pinned():
            hwfuse.op(case.op)(*args, **kwargs)
    except PinnedUnavailable as error:
        if reason not in str(error):
            raise case.error(f"refused without saying {reason!r}: {error}") from error
        return
    raise case.error(f"ran although it {reason}something else")


def _on_cpu(value: Any) -> Any:
    """Give a meta tensor uninitialised memory; it keeps its strides and its alignment."""
    if not isinstance(value, Tensor):
        return value
    memory = torch.empty(value.untyped_storage().nbytes(), dtype=torch.uint8).view(value.dtype)
    return memory.as_strided(value.shape, value.stride(), value.storage_offset())


def _variants(case: Case, keywords: dict[str, Any], fact: Fact) -> Iterator[dict[str, Any]]:
    """Yield arguments that differ from the ordinary ones in what a fact may speak of."""
    for changed in ({}, *_keyword_changes(case, keywords, fact)):
        try:
            yield _explain.inputs(case.spec, device="meta", **{**keywords, **changed})
        except InputError:
            continue
    arguments = _explain.inputs(case.spec, device="meta", **keywords)
    for name in case.spec.parameters:
        if isinstance(arguments[name], Tensor):
            yield from ({**arguments, name: tensor} for tensor in _changes(arguments[name]))
        elif isinstance(arguments[name], str):
            yield from ({**arguments, name: word} for word in _matrix.words_of(case.spec, name))
        elif isinstance(arguments[name], torch.dtype | None):
            yield from ({**arguments, name: dtype} for dtype in _DTYPES)


def _keyword_changes(case: Case, keywords: dict[str, Any], fact: Fact) -> Iterator[dict[str, Any]]:
    numbers = [int(digits) for digits in re.findall(r"(?<![\w.])\d+", fact.source)]
    near = sorted({v for n in numbers for v in (n - 1, n, n + 1, 2 * n, n // 2)})
    for name, default in _matrix.defaults(case.spec).items():
        value = keywords.get(name, default)
        if isinstance(value, bool):
            yield {name: not value}
        elif isinstance(value, int) and name != "seed":
            around = (1, value - 1, value + 1, 2 * value, 3 * value, value // 2)
            yield from ({name: number} for number in (*near, *around) if number >= 0)
        elif isinstance(default, torch.dtype | None):
            yield from ({name: dtype} for dtype in _DTYPES)


def _changes(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the tensor in other dtypes, off its alignment, with rows apart, and by columns."""
    yield from (tensor.to(dtype) for dtype in _DTYPES)
    memory = torch.empty(tensor.untyped_storage().nbytes() + 64, dtype=tensor.dtype, device="meta")
    yield memory.as_strided(tensor.shape, tensor.stride(), 1)
    yield from filter(lambda wide: wide is not None, (wider_rows(tensor, n) for n in (1, 8)))
    if tensor.ndim == 2:
        num_rows, width = tensor.shape
        for pitch in (num_rows, (num_rows + 3) // 4 * 4, num_rows + 5):
            yield memory.new_empty(pitch * width).as_strided((num_rows, width), (1, pitch))
        yield memory.new_empty(num_rows, width)

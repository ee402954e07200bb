"""The parity harness: every implementation of every op, against the reference.

::

    from hwfuse.testing import parity_tests

    test_parity = parity_tests("acme")  # for pytest: all implementations of the backend acme

`run` does the same without pytest and returns a `Report`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import hwfuse
from hwfuse import _spec, _state
from hwfuse._implementation import REFERENCE, Implementation
from hwfuse.testing import _cases, _matrix, _programs, _selection, _values, evidence
from hwfuse.testing._cases import Case, NotTaken, Place
from hwfuse.testing._matrix import Matrix, Row

OP_ITSELF = "*"  # in the place of an id: a check of the op, not of one implementation


@dataclass(frozen=True)
class Check:
    """One thing to prove.

    `prove` returns None or a note for the report; it raises `ParityError`, or `NotTaken` with the
    reason why it was not tried.
    """

    case: Case
    implementation: str
    label: str
    prove: Callable[[], str | None]

    @property
    def name(self) -> str:
        """As pytest shows it: ``fused_qkvzba-acme/index-cpu-bfloat16-m=37-interleaved``."""
        return f"{self.case.op}-{self.implementation}-{self.case.place.target}-{self.label}"


@dataclass
class Line:
    """What came out for one implementation of one op on one target.

    Attributes:
        passed: How many checks passed.
        failed: Check name to what was wrong.
        skipped: Reason to how many checks were not tried for it.
        unreached: Who is always preferred, if no call gets this one without asking for it.
    """

    passed: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    unreached: str | None = None


@dataclass
class Report:
    """What `run` found, by (op, implementation, target); implementation ``*`` is the op itself."""

    lines: dict[tuple[str, str, str], Line] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """True if nothing failed and something passed."""
        lines = self.lines.values()
        return not any(line.failed for line in lines) and any(line.passed for line in lines)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        lines = [
            {
                "op": op,
                "implementation": identifier,
                "target": target,
                "passed": line.passed,
                "failed": line.failed,
                "skipped": dict(line.skipped),
                "unreached": line.unreached,
            }
            for (op, identifier, target), line in self.lines.items()
        ]
        return {"ok": self.ok, "lines": lines}


def run(
    ops: Collection[str] | None = None,
    backends: Collection[str] | None = None,
    device: str | None = None,
    *,
    matrix: Matrix | str | os.PathLike[str] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Report:
    """Prove what can be proved on this machine and count it.

    Args:
        ops: Names; None for all.
        backends: Names of backends; None for all.
        device: Only this target, ``"rocm:gfx950"``, or this kind, ``"cuda"``.
        matrix: Op name to `row`, or a Python file with such a ``MATRIX``.  Ops without a row get
            one from the defaults of their ``make_inputs``.
        progress: Called with the number done, the number of all, and the name of the next check.
    """
    report = Report()
    todo = checks(ops, backends, device, matrix)
    for done, check in enumerate(todo):
        if progress:
            progress(done, len(todo), check.name)
        key = (check.case.op, check.implementation, check.case.place.target)
        line = report.lines.setdefault(key, Line())
        try:
            line.unreached = check.prove() or line.unreached
            line.passed += 1
        except NotTaken as reason:
            line.skipped[str(reason)] += 1
        except Exception as error:  # noqa: BLE001 - of anybody's code; the others go on
            is_ours = isinstance(error, _cases.ParityError)
            line.failed[check.name] = str(error) if is_ours else f"{type(error).__name__}: {error}"
    return report


def parity_tests(
    *backends: str,
    ops: Collection[str] | None = None,
    device: str | None = None,
    matrix: Matrix | str | os.PathLike[str] | None = None,
) -> Callable[..., None]:
    """Return a pytest function with one case for each check of these backends.

    Args:
        *backends: Names of backends; none for all.
        ops: As for `run`.
        device: As for `run`.
        matrix: As for `run`.

    Raises:
        ValueError: A backend is not installed, broken, or implements nothing of *ops*.
    """
    import pytest

    for backend in backends:
        if problem := _state.registry().unusable(f"{backend}/"):
            raise ValueError(problem)
    found = checks(ops, backends or None, device, matrix)
    if not found:
        raise ValueError(f"{' and '.join(backends)} implement nothing that can be checked")

    @pytest.mark.parametrize("check", found, ids=lambda check: check.name)
    def test_parity(check: Check) -> None:
        try:
            check.prove()
        except NotTaken as reason:
            pytest.skip(str(reason))
        except BaseException:
            _record(check, passed=False)
            raise
        _record(check, passed=True)

    return test_parity


def _record(check: Check, *, passed: bool) -> None:
    """Note what a check proves: on a device, or of a Triton kernel in the interpreter."""
    place = check.case.place
    if place.device == "cuda":
        level = "hardware"
    elif place.target != "cpu" and check.implementation.endswith("/triton"):
        level = "interpreted"
    else:
        return  # on the CPU there is nothing between an implementation and its proof
    evidence.record(check.case.op, check.implementation, place.target, level, passed=passed)


def checks(
    ops: Collection[str] | None = None,
    backends: Collection[str] | None = None,
    device: str | None = None,
    matrix: Matrix | str | os.PathLike[str] | None = None,
) -> list[Check]:
    """List what there is to prove; the arguments are those of `run`."""
    lines = _matrix.read(matrix)
    found: list[Check] = []
    for op in _spec.names() if ops is None else ops:
        spec = hwfuse.op(op).spec
        for implementation in _state.registry().implementations(op).values():
            if backends is None or implementation.backend in backends:
                line = lines.get(op)
                inputs = _matrix.inputs(spec, line, implementation)
                for place in _cases.places(implementation, device):
                    found += _of_implementation(implementation, place, inputs, line)
                if implementation.id == REFERENCE and device in (None, "cpu"):
                    found += _of_op(implementation, inputs)
    return found


def _of_implementation(
    implementation: Implementation,
    place: Place,
    inputs: Mapping[str, dict[str, Any]],
    line: Row | None,
) -> Iterator[Check]:
    base = Case(implementation.op, implementation.id, place, _matrix.most_rows(inputs))

    def check(label: str, function: Callable[..., str | None], *args: Any) -> Check:
        return Check(base, implementation.id, label, functools.partial(function, base, *args))

    if implementation.problem or place.missing:
        yield check("load", _broken, implementation.problem, place.missing)
        return
    everything = list(inputs.values())
    if absent := place.lacks(implementation):
        yield check("load", _broken, None, absent)
    else:
        for label, keywords in inputs.items():
            case = dataclasses.replace(base, keywords=keywords)
            prove = functools.partial(_values.check_values, case)
            yield Check(case, implementation.id, label, prove)
            if place.device == "cuda" and implementation.vendor:
                replay = functools.partial(_programs.check_replayed, case)
                yield Check(case, implementation.id, f"replayed-{label}", replay)
        if place.device == "cuda" and implementation.vendor:
            yield check("compiled", _programs.check_compiled_here)
        yield check("reached", _selection.check_reached, everything)
        yield check("traits", _values.check_traits)
        if implementation.requires.differentiable:
            yield check("gradient", _programs.check_gradient)
    if implementation.requires.facts or implementation.requires.arch:
        implied = line.implied if line else ()
        # Backwards, from the most rows: an empty tensor breaks few facts.
        yield check("rejections", _selection.check_rejections, everything[::-1], implied)


def _broken(case: Case, problem: str | None, missing: str | None) -> None:
    if problem:
        raise case.error(problem)
    raise NotTaken(missing)


def _of_op(reference: Implementation, inputs: Mapping[str, dict[str, Any]]) -> Iterator[Check]:
    """Yield what is proved of the op itself, once for each set of words and flags it is given."""
    programs = {
        "compiled": _programs.check_compiled,
        "exported": _programs.check_exported,
        "opcheck": _programs.check_registration,
    }
    if not reference.requires.differentiable:
        programs["no-gradient"] = _programs.check_no_gradient
    seen = set()
    for keywords in inputs.values():
        words = tuple(str(v) for v in keywords.values() if isinstance(v, str | bool))
        if words not in seen:
            seen.add(words)
            case = Case(reference.op, REFERENCE, Place("cpu", "cpu"), keywords)
            for name, function in programs.items():
                label = "-".join([name, *words])
                yield Check(case, OP_ITSELF, label, functools.partial(function, case))

"""One op at one shape and M: every implementation and peer, checked and then timed."""

from __future__ import annotations

import contextlib
import functools
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

import hwfuse
from hwfuse import _op, _spec, _state, _variants
from hwfuse._bench import floors, inputs, peers, timing, work
from hwfuse._bench.inputs import Arguments
from hwfuse._bench.peers import Missing, Peer
from hwfuse._bench.report import OURS, PEER, PLAIN
from hwfuse._bench.shapes import Task
from hwfuse._errors import HwfuseWarning, InputError
from hwfuse._implementation import REFERENCE, Implementation
from hwfuse.testing import _cases, _values
from hwfuse.testing.compare import compare

Starting = Callable[[str], bool]


@dataclass
class Row:
    """What is known of one contestant; *problem*: why it has no time."""

    op: str
    shape: str
    m: int
    implementation: str
    kind: str
    us: float | None = None
    least_us: float | None = None
    most_us: float | None = None
    how: str = ""
    launches: int | None = None
    host_us: float | None = None
    bytes: int = 0
    floor_us: float | None = None
    floor: str = ""
    variant: str = ""
    note: str = ""
    problem: str = ""
    is_wrong: bool = False
    seconds: float = 0.0  # that the row took

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


@dataclass
class Bench:
    """The inputs of one task, and the results that the reference gives for them."""

    task: Task
    first: Arguments
    expected: dict[str, Tensor]
    num_bytes: int
    floor: tuple[float, str]
    replays: int
    packed: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @functools.cached_property
    def sets(self) -> list[Arguments]:
        """The first set and its successors."""
        rest = range(1, timing.num_sets(self.num_bytes))
        return [self.first, *(inputs.next_set(self.task, self.first, i) for i in rest)]

    @functools.cached_property
    def packed_sets(self) -> list[Arguments]:
        """The same calls with packed weights."""
        return [inputs.packed(each, self.packed) or each for each in self.sets]


def rows(task: Task, libraries: Sequence[str], replays: int, starting: Starting) -> Iterator[Row]:
    """Measure; *starting* is told who is next and may refuse it."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", HwfuseWarning)
        if not starting("inputs"):
            return
        bench = _prepare(task, replays)
        for found in _implementations(task.op):
            if starting(found.id):
                yield _guarded(_ours, bench, found)
        for peer in peers.of(task.op, libraries):
            if starting(peer.name):
                yield _guarded(_theirs, bench, peer)
        torch.compiler.reset()  # or each call would look through the code of all tasks before


def warm(task: Task, libraries: Sequence[str], starting: Starting) -> None:
    """Call everything once, so that what is compiled lies in its caches on disk."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = inputs.first_set(task)
        for found in _implementations(task.op):
            if found.id != REFERENCE and starting(found.id):
                form = next((form for form in forms(first) if not _refused(found, form)), None)
                if form is not None:
                    _quietly(_function(found, inputs.copied(form)))
        for peer in peers.of(task.op, libraries):
            if starting(peer.name):
                _quietly(lambda peer=peer: peer.prepare(inputs.copied(first))())  # type: ignore[misc]
        torch.cuda.synchronize()


def _quietly(call: Callable[[], Any]) -> None:
    with contextlib.suppress(Exception):  # the timed run meets it again and says it
        call()


def _prepare(task: Task, replays: int) -> Bench:
    spec = _spec.load(task.op)
    first = inputs.first_set(task)
    own = inputs.copied(first)
    args, kwargs = spec.split(_values.resolved(own))
    result = _state.registry().implementations(task.op)[REFERENCE].load()(*args, **kwargs)
    outputs = work.as_tensors(result)
    num_bytes = work.num_bytes(spec, first, outputs)
    expected = {name: own[name] for name in spec.mutates} or dict(
        zip(spec.compare, outputs, strict=True)
    )
    return Bench(task, first, expected, num_bytes, floor(task.op, first, num_bytes), replays)


def floor(op: str, arguments: Arguments, num_bytes: int) -> tuple[float, str]:
    """Return the µs that nobody can beat but by programmatic launch, and what they are."""
    if op not in work.MATRIX_OPS:
        return max(floors.launch_us(), floors.copy_us(num_bytes)), "copy"
    peak = floors.peak_flops(is_fp8=op in work.FP8_MATRIX_OPS)
    computing = work.num_flops(op, arguments) / peak * 1e6
    reading = floors.read_us(num_bytes)
    return (reading, "read") if reading > computing else (computing, "matrix peak")


def _implementations(op: str) -> list[Implementation]:
    """Return those of this vendor and the reference, which is first."""
    found = _state.registry().implementations(op).values()
    here = [i for i in found if any(p.device == "cuda" for p in _cases.places(i, None))]
    return sorted(here, key=lambda i: (i.id != REFERENCE, i.id))


def _guarded(measure: Callable[[Bench, Any, Row], None], bench: Bench, contestant: Any) -> Row:
    """Fill a row; what goes wrong becomes its problem."""
    is_peer = isinstance(contestant, Peer)
    name = contestant.name if is_peer else contestant.id
    kind = PEER if is_peer else PLAIN if name == REFERENCE else OURS
    row = Row(*bench.task, implementation=name, kind=kind, bytes=bench.num_bytes)
    row.floor_us, row.floor = bench.floor
    start = time.perf_counter()
    try:
        measure(bench, contestant, row)
    except Missing as reason:
        row.problem = str(reason)
    except Exception as error:  # noqa: BLE001 - one contestant must not end the others
        torch.cuda.synchronize()  # raises if this process can use the GPU no more
        row.problem = peers.brief(error)
    row.seconds = time.perf_counter() - start
    return row


def _ours(bench: Bench, found: Implementation, row: Row) -> None:
    if found.problem:
        row.problem = found.problem
        return
    form, refusal = bench.first, _refused(found, bench.first)
    if refusal:
        packed = inputs.packed(bench.first, bench.packed)
        if packed is None or _refused(found, packed):
            row.problem = refusal
            return
        form, row.note = packed, "weights packed"
    op: Any = _op.op(found.op)
    decision, _, call = op.decide(form)
    row.variant = _variants.running(found, call.values) or ""
    own = inputs.copied(form)
    _check(bench, own, _function(found, own)(), {}, row)
    if not row.is_wrong:
        sets = bench.sets if form is bench.first else bench.packed_sets
        if _spec.load(found.op).mutates:  # it would write into what others are compared with
            sets = [inputs.copied(each) for each in sets]
        _time(bench, [_function(found, each) for each in sets], row)
        args, kwargs = _spec.load(found.op).split(sets[0])
        # Pinned only if it must be: what runs by itself is timed as users call it.
        is_chosen = decision.chosen == found.id
        with nullcontext() if is_chosen else hwfuse.using(**{found.op: found.id}):
            _time_host(lambda: op(*args, **kwargs), row)


def _theirs(bench: Bench, peer: Peer, row: Row) -> None:
    row.note = peer.note
    own = inputs.copied(bench.first)
    _check(bench, own, peer.prepare(own)(), peer.tolerance, row)
    if not row.is_wrong:
        calls = [peer.prepare(each) for each in bench.sets]
        _time(bench, calls, row)
        _time_host(calls[0], row)


def _time(bench: Bench, calls: Sequence[timing.Call], row: Row) -> None:
    row.us, row.least_us, row.most_us, row.how = timing.device_time(calls, bench.replays)
    row.launches = timing.num_launches(calls[0]) if row.how == "graph" else None


def _time_host(call: timing.Call, row: Row) -> None:
    if row.how == "graph":  # otherwise the host waits for the GPU, and its time is in the other
        row.host_us = timing.host_us(call)


def _check(
    bench: Bench,
    arguments: Arguments,
    result: Any,
    tolerance: Mapping[str, peers.Comparator],
    row: Row,
) -> None:
    """Compare each output that was given; say in the row if one is wrong."""
    spec = _spec.load(bench.task.op)
    outputs = work.as_tensors(result) or tuple(arguments[name] for name in spec.mutates)
    found = {name: x for name, x in zip(spec.compare, outputs, strict=False) if x is not None}
    for name, tensor in found.items():
        comparator = tolerance.get(name, spec.compare[name])
        text = compare(comparator, tensor, bench.expected[name], {**arguments, **found})
        if text:
            row.is_wrong, row.problem = True, f"output {name}: {text}"
            return


def _function(found: Implementation, arguments: Arguments) -> timing.Call:
    function = found.load()
    args, kwargs = _spec.load(found.op).split(_values.resolved(arguments))
    return lambda: function(*args, **kwargs)


def _refused(found: Implementation, arguments: Arguments) -> str | None:
    """Return why an implementation does not take a call, or None."""
    args, kwargs = _spec.load(found.op).split(arguments)
    try:
        with hwfuse.using(**{found.op: found.id}):
            decision = hwfuse.explain(found.op, *args, **kwargs)
    except InputError as error:
        return str(error)
    if decision.chosen == found.id:
        return None
    return "; ".join(decision.rejected.get(found.id, ("not a candidate",)))


def forms(arguments: Arguments) -> Iterator[Arguments]:
    """Yield the call with its weights as a checkpoint has them, then packed for a kernel."""
    yield arguments
    packed = inputs.packed(arguments, {})
    if packed is not None:
        yield packed

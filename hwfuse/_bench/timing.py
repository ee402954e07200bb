"""Device time in replayed CUDA graphs, and host time of eager calls.

A graph holds n calls, about 1.5 ms of them, and each call has the next of R sets of inputs and of
outputs: together larger than the L2 cache, so that nothing is found there that a model would not
find.  A time is the median of the replays and includes the gap between two kernels.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

Call = Callable[[], Any]

ROTATED = 256 << 20  # bytes of all sets together: four times the L2 cache of an H200
_FEWEST, _MOST = 2, 32  # sets
_GRAPH_US = 1500.0
_MOST_CALLS = 400  # per graph
_EAGER_S = 0.05  # per loop of eager calls
_UNTIMED = 2  # replays


class Time(NamedTuple):
    """Median, fastest and slowest µs of a call, and whether in a graph or eager."""

    us: float
    least: float
    most: float
    how: str


def num_launches(call: Call) -> int | None:
    """Return how many nodes a call is in a CUDA graph; None where nobody can tell."""
    with contextlib.suppress(Exception):  # older releases of torch keep no graph
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        _capture([call], 1, graph)
        count = ctypes.c_size_t()
        handle = ctypes.c_void_p(graph.raw_cuda_graph())
        driver = ctypes.CDLL("libcuda.so.1")
        if driver.cuGraphGetNodes(handle, None, ctypes.byref(count)) == 0:
            return count.value
    return None


def num_sets(num_bytes: int) -> int:
    """Return how many sets of this size reach `ROTATED`."""
    return min(_MOST, max(_FEWEST, math.ceil(ROTATED / max(1, num_bytes))))


def device_time(calls: Sequence[Call], replays: int = 11) -> Time:
    """Return the device time of a call; *calls*: the same one on different memory."""
    if waits_for_the_gpu(calls[0]):
        return _eager(calls, replays)
    graph = _capture(calls, len(calls))
    guess = min(_event_us(graph.replay) for _ in range(3)) / len(calls)
    rounds = math.ceil(_GRAPH_US / max(guess, 0.5) / len(calls))
    num_calls = min(max(1, _MOST_CALLS // len(calls)), max(1, rounds)) * len(calls)
    if num_calls > len(calls):
        graph = _capture(calls, num_calls)
    for _ in range(_UNTIMED):
        graph.replay()
    times = [_event_us(graph.replay) / num_calls for _ in range(replays)]
    return Time(statistics.median(times), min(times), max(times), "graph")


def host_us(call: Call) -> float:
    """Return the median µs that the host needs to issue a call; it does not wait for the end."""
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    count = max(3, min(50, int(_EAGER_S / 5 / (time.perf_counter() - start))))
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        times.append((time.perf_counter() - start) / count * 1e6)
    torch.cuda.synchronize()
    return statistics.median(times)


def waits_for_the_gpu(call: Call) -> bool:
    """Tell whether the host reads results, which cannot be captured; also warms the call up."""
    stream, before = torch.cuda.Stream(), torch.cuda.get_sync_debug_mode()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with warnings.catch_warnings(), torch.cuda.stream(stream):
            warnings.simplefilter("ignore")  # that this mode is a prototype
            call()
            call()
            torch.cuda.set_sync_debug_mode("error")
            call()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
        torch.cuda.synchronize()
    return False


def _capture(
    calls: Sequence[Call], count: int, graph: torch.cuda.CUDAGraph | None = None
) -> torch.cuda.CUDAGraph:
    # Not `torch.cuda.graph`, which collects garbage and empties the allocator's cache each time.
    graph, stream = graph or torch.cuda.CUDAGraph(), torch.cuda.Stream()
    kept: list[Any] = [None] * len(calls)  # results that live get memory of their own
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        graph.capture_begin()
        try:
            for i in range(count):
                kept[i % len(calls)] = calls[i % len(calls)]()
        finally:
            graph.capture_end()
    return graph


def _eager(calls: Sequence[Call], replays: int) -> Time:
    times: list[float] = []
    while len(times) < 3 or (len(times) < replays and sum(times) < _EAGER_S * 1e6):
        times.append(_event_us(calls[len(times) % len(calls)]))
    return Time(statistics.median(times), min(times), max(times), "eager")


def _event_us(call: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3

"""The floors: what a plain copy, a plain read, an empty launch and a large matrix product take.

Each is the fastest of several ways to do it: PyTorch's, and plain CUDA kernels of 16-byte accesses
in some launch shapes, which NVRTC compiles; where it cannot, PyTorch's alone.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hwfuse._bench.timing import Call, device_time, num_sets

_COPY = """
extern "C" __global__ void copy(const int4* x, int4* y, int n) {
  int step = gridDim.x * blockDim.x;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step) y[i] = x[i];
}
"""
# The sum is never the one that would be written, but the compiler cannot know.
_READ = """
extern "C" __global__ void read(const int4* x, int4* y, int n) {
  int step = gridDim.x * blockDim.x;
  unsigned sum = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step) {
    int4 v = x[i];
    sum |= v.x | v.y | v.z | v.w;
  }
  if (sum == 0x9e3779b9u) y[0].x = sum;
}
"""
_MOST_BLOCKS = 1 << 20


@functools.cache
def copy_us(num_bytes: int) -> float:
    """Return the time of the fastest plain copy that moves *num_bytes*, half read, half written."""
    pairs = _memory(num_bytes // 2, num_sets(num_bytes))
    ways: list[list[Call]] = [
        [functools.partial(y.copy_, x) for x, y in pairs],
        # An elementwise kernel: in a graph `copy_` is a node of its own, slower if it is large.
        [functools.partial(torch.bitwise_not, x, out=y) for x, y in pairs],
        *_launches(_COPY, "copy", pairs),
    ]
    return min(device_time(calls).us for calls in ways)


@functools.cache
def read_us(num_bytes: int) -> float:
    """Return the time of the fastest plain kernel that reads *num_bytes*."""
    pairs = _memory(num_bytes, num_sets(num_bytes), results=4)
    sums: list[Call] = [functools.partial(torch.sum, x.view(torch.float32)) for x, _ in pairs]
    ways = [sums, *_launches(_READ, "read", pairs)]
    return min(device_time(calls).us for calls in ways)


@functools.cache
def launch_us() -> float:
    """Return the time of a kernel that does next to nothing."""
    return copy_us(32)


@functools.cache
def peak_flops(*, is_fp8: bool) -> float:
    """Return the measured rate of a large matrix product, in floating point operations per s."""
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    call: Call = functools.partial(torch.mm, a, b.t())
    if is_fp8 and torch.cuda.get_device_capability() >= (8, 9):
        one = torch.ones((), device="cuda")
        # F.scaled_mm, its public name, is not in every release.
        scaled_mm: Callable[..., Tensor] = torch._scaled_mm  # noqa: SLF001
        fp8 = torch.float8_e4m3fn
        call = functools.partial(
            scaled_mm, a.to(fp8), b.to(fp8).t(), scale_a=one, scale_b=one,
            out_dtype=torch.bfloat16, use_fast_accum=True,
        )  # fmt: skip
    return 2 * n**3 / (device_time([call]).us * 1e-6)


def _memory(num_bytes: int, count: int, results: int | None = None) -> list[tuple[Tensor, Tensor]]:
    """Return pairs of int32 tensors, the second as long as the first or *results* long."""
    words = max(4, -(-num_bytes // 16) * 4)
    make = functools.partial(torch.zeros, dtype=torch.int32, device="cuda")
    return [(make(words), make(results or words)) for _ in range(count)]


def _launches(
    source: str, name: str, pairs: Sequence[tuple[Tensor, Tensor]]
) -> Iterator[list[Call]]:
    """Yield for each launch shape the calls of a kernel; none if it cannot be compiled."""
    kernel = _compiled(source, name)
    if kernel is None:
        return
    count = pairs[0][0].numel() // 4
    processors = torch.cuda.get_device_properties().multi_processor_count
    shapes = {(threads, -(-count // threads)) for threads in (128, 256, 1024)}
    shapes |= {(256, -(-count // 1024)), (512, 4 * processors), (1024, 2 * processors)}
    for threads, blocks in sorted(shapes):
        if blocks <= min(_MOST_BLOCKS, -(-count // threads)):
            yield [
                functools.partial(kernel, (blocks, 1, 1), (threads, 1, 1), [x, y, count])
                for x, y in pairs
            ]


@functools.cache
def _compiled(source: str, name: str) -> Callable[..., Any] | None:
    with contextlib.suppress(Exception):  # a private name, and NVRTC may be missing
        compile_kernel: Callable[..., Any] = torch.cuda._compile_kernel  # noqa: SLF001
        kernel: Callable[..., Any] = compile_kernel(source, name)
        return kernel
    return None

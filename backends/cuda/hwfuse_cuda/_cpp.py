"""CUDA C++ kernels of our own: compiled on this machine at first use, launched through the driver.

An op's file makes a `Kernel` per combination of constants, keeps it (`functools.cache`) and calls
it with the device, the number of blocks and the kernel's arguments.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Mapping

import torch

from hwfuse import _cuda
from hwfuse_cuda import _compile, _driver
from hwfuse_triton import _record
from hwfuse_triton._launch import has_pdl

# The public torch.cuda.current_stream makes an object of it: 2.9 µs instead of 0.03.
_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None) or (
    lambda device: torch.cuda.current_stream(device).cuda_stream
)


class Kernel:
    """One kernel of a file in ``cpp`` with its constants and launch options.

    Args:
        source: File name, as ``"w4a8_moe_prep.cu"``.
        name: The kernel's, which is ``extern "C"``.
        types: One code for each argument: ``P`` pointer, ``i`` int, ``q`` long long, ``f`` float,
            ``128s`` a TMA descriptor (`hwfuse_cuda._driver.tensor_map`).
        block: Threads per block.
        shared: Bytes of dynamic shared memory.
        pdl: Programmatic dependent launch: the kernel may start before the one before it has ended,
            and waits itself (``griddepcontrol.wait``).  Left out where the device has no such.
        cluster: Blocks per cluster.
        arch: ``"sm90a"`` if the source wants just that; default: the device's own.
        defines: Macros by name.
    """

    def __init__(
        self,
        source: str,
        name: str,
        types: tuple[str, ...],
        *,
        block: int,
        shared: int = 0,
        pdl: bool = False,
        cluster: int = 1,
        arch: str | None = None,
        defines: Mapping[str, str | int] | None = None,
    ) -> None:
        self.source, self.name, self.arch, self.defines = source, name, arch, defines
        self.shared, self.cluster = shared, cluster
        self._kinds, self._block, self._pdl = "".join(types), block, pdl
        self._functions: dict[int, ctypes.c_void_p] = {}
        self._config = _driver.Config(block, shared, pdl=pdl, cluster=cluster)
        self._arguments = _driver.Arguments(types)
        self._lock = threading.Lock()  # configuration and arguments are one memory for all threads

    def __call__(self, device: int, blocks: int, *values: float | bytes) -> None:
        """Run *blocks* blocks on torch's current stream of *device*, the current device.

        Args:
            device: Its index, ``x.get_device()``.
            blocks: At least 1.
            *values: The kernel's arguments: ``x.data_ptr()`` for a pointer.
        """
        function = self._functions.get(device) or self._load(device)
        config, arguments = self._config, self._arguments
        with self._lock:
            arguments.pack(arguments.memory, 0, *values)
            config.grid[0] = blocks
            config.raw.stream = _stream(device)
            status = self._launch(config.pointer, function, arguments.pointers, None)
            if status:
                _driver.again(status, function, config, arguments, device)
        if _record.active is not None and (recording := _record.mine()):
            recording.launched(self._binary(function, device), (blocks, 1, 1), values)

    def _binary(self, function: ctypes.c_void_p, device: int) -> _record.Kernel | str:
        """Return what a recorded call launches, or why it cannot be repeated."""
        if not set(self._kinds) <= set("PiIqf"):
            return "a TMA descriptor holds addresses"
        return _record.Kernel(
            function=function.value or 0,
            block=self._block,
            shared=self.shared,
            kinds=self._kinds,
            pdl=self._pdl and has_pdl(device),  # as _driver.Config has it for this device
            cluster=self.cluster,
            keep=self,
        )

    def max_cluster(self, device: int) -> int:
        """Return how many blocks can form a cluster on *device*: 8 or 16."""
        function = self._functions.get(device) or self._load(device)
        return _driver.max_cluster(function, self._config)

    def code(self, arch: str) -> bytes:
        """Return the machine code for an arch, from the cache or compiled now."""
        return _compile.cubin(self.source, self.arch or arch, self.defines)

    def _load(self, device: int) -> ctypes.c_void_p:
        _cuda.refuse_capture(f"{self.name} in {self.source}")
        code = self.code(_cuda.vendor_and_arch(device)[1])
        function = _driver.function(code, self.name, device, self.shared, self.cluster)
        self._arguments.check(code, self.name)
        if not has_pdl(device):
            self._config.without_pdl()
        self._launch = _driver.driver().cuLaunchKernelEx
        self._functions[device] = function
        return function


@functools.cache
def num_sms(device: int) -> int:
    """Return how many multiprocessors a device has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def divisor(number: int) -> tuple[int, int]:
    """Return (factor, shift) with ``n // number == n * factor >> 32 + shift`` for n < 2**31.

    There is none for 1.
    """
    bits = max(number - 1, 1).bit_length()
    return -(-(1 << (31 + bits)) // number) & 0xFFFFFFFF, bits - 1

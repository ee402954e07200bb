"""The CUDA driver through ctypes: load a cubin, launch a kernel, describe a tensor to TMA."""

from __future__ import annotations

import ctypes
import functools
import struct
from typing import Any

from hwfuse_cuda._cubin import parameter_sizes

# CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, …_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
_SHARED_SIZE, _ANY_CLUSTER = 8, 14
_CLUSTER, _PDL = 4, 6  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, …_PROGRAMMATIC_STREAM_SERIALIZATION
_NO_CONTEXT = (201, 400)  # CUDA_ERROR_INVALID_CONTEXT, CUDA_ERROR_INVALID_HANDLE


class DriverError(RuntimeError):
    """A call of the CUDA driver that failed."""


class _Attribute(ctypes.Structure):  # CUlaunchAttribute
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint * 16))


class _Config(ctypes.Structure):  # CUlaunchConfig
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


@functools.cache
def driver() -> ctypes.CDLL:
    """Return the driver's library."""
    library = ctypes.CDLL("libcuda.so.1")
    library.cuGetErrorName.argtypes = (ctypes.c_int, ctypes.c_void_p)
    return library


def check(what: str, status: int) -> None:
    """Raise if a driver call failed."""
    if status:
        name = ctypes.c_char_p()
        driver().cuGetErrorName(status, ctypes.byref(name))
        text = (name.value or b"an unknown error").decode()
        raise DriverError(f"{what} failed with {text} ({status})")


@functools.cache
def _context(device: int) -> ctypes.c_void_p:
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    library = driver()
    check("cuDeviceGet", library.cuDeviceGet(ctypes.byref(handle), device))
    status = library.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle)
    check("cuDevicePrimaryCtxRetain", status)
    return context


def enter(device: int) -> None:
    """Make torch's context of a device the thread's own; a fresh thread has none."""
    check("cuCtxSetCurrent", driver().cuCtxSetCurrent(_context(device)))


@functools.cache
def module(code: bytes, device: int) -> ctypes.c_void_p:
    """Load a cubin on a device."""
    enter(device)
    loaded = ctypes.c_void_p()
    check("cuModuleLoadData", driver().cuModuleLoadData(ctypes.byref(loaded), code))
    return loaded


def function(code: bytes, name: str, device: int, shared: int, cluster: int) -> ctypes.c_void_p:
    """Return a kernel of a cubin, allowed *shared* bytes of dynamic shared memory and a cluster."""
    loaded = module(code, device)
    found = ctypes.c_void_p()
    status = driver().cuModuleGetFunction(ctypes.byref(found), loaded, name.encode())
    check(f"cuModuleGetFunction({name!r})", status)
    if shared:  # over 48 KB together with the kernel's own arrays, it must be asked for
        status = driver().cuFuncSetAttribute(found, _SHARED_SIZE, shared)
        check(f"{shared} bytes of shared memory for {name!r}", status)
    if cluster > 8:  # more than every GPU with clusters has
        status = driver().cuFuncSetAttribute(found, _ANY_CLUSTER, 1)
        check(f"a cluster of {cluster} blocks for {name!r}", status)
    return found


class Arguments:
    """Where the driver reads a kernel's arguments; their types as `struct` spells them.

    ``P`` pointer, ``i`` int, ``q`` long long, ``f`` float, ``128s`` a TMA descriptor.  A value that
    does not fit its type is an error, never cut off.
    """

    def __init__(self, types: tuple[str, ...]) -> None:
        layout = struct.Struct("@" + "".join(types))
        self.pack = layout.pack_into  # (memory, 0, *values)
        self.memory = ctypes.create_string_buffer(layout.size)
        self.sizes = [struct.calcsize(code) for code in types]
        ends = [struct.calcsize("@" + "".join(types[: i + 1])) for i in range(len(types))]
        start = ctypes.addressof(self.memory)
        places = [start + end - size for end, size in zip(ends, self.sizes, strict=True)]
        self.pointers = (ctypes.c_void_p * len(types))(*places)

    def check(self, code: bytes, name: str) -> None:
        """Raise unless the compiled kernel takes exactly these sizes.

        A wrong number would let the driver read past the arguments.
        """
        sizes = parameter_sizes(code, name)
        if sizes not in (self.sizes, None):
            raise DriverError(f"{name} takes arguments of {sizes} bytes, found {self.sizes}")


class Config:
    """What stays the same from launch to launch, and the grid and stream, which do not."""

    def __init__(self, block: int, shared: int, *, pdl: bool, cluster: int) -> None:
        attributes = [
            _Attribute(_CLUSTER, 0, (ctypes.c_uint * 16)(cluster, 1, 1)),
            _Attribute(_PDL, 0, (ctypes.c_uint * 16)(1)),
        ]
        used = attributes[0 if cluster > 1 else 1 : 2 if pdl else 1]
        self._keep = (_Attribute * len(used))(*used)
        self.has_pdl = pdl
        self.raw = _Config(
            (ctypes.c_uint * 3)(cluster, 1, 1), (ctypes.c_uint * 3)(block, 1, 1), shared, None,
            self._keep, len(used),
        )  # fmt: skip
        self.grid = self.raw.grid  # a view: what is written here, the driver reads
        self.pointer = ctypes.byref(self.raw)

    def without_pdl(self) -> None:
        """Launch the ordinary way, on every device; the kernel's wait then waits for nothing."""
        self.raw.num_attributes -= self.has_pdl
        self.has_pdl = False


def max_cluster(kernel: ctypes.c_void_p, config: Config) -> int:
    """Return how many blocks of a kernel can form a cluster on the current device: 8 or 16."""
    blocks = ctypes.c_int()
    driver().cuOccupancyMaxPotentialClusterSize(ctypes.byref(blocks), kernel, config.pointer)
    return 16 if blocks.value >= 16 else 8


def again(
    status: int, kernel: ctypes.c_void_p, config: Config, arguments: Arguments, device: int
) -> None:
    """Repeat a failed launch in torch's context, which a fresh thread has not entered yet."""
    if status in _NO_CONTEXT:
        enter(device)
        status = driver().cuLaunchKernelEx(config.pointer, kernel, arguments.pointers, None)
    check("cuLaunchKernelEx", status)


@functools.lru_cache(maxsize=1024)
def tensor_map(
    address: int,
    dtype: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    *,
    swizzle: int = 0,
    promotion: int = 2,
) -> bytes:
    """Return the 128 bytes that describe a tiled tensor to TMA (``cuTensorMapEncodeTiled``).

    Args:
        address: Of the tensor, a multiple of 16.
        dtype: A ``CUtensorMapDataType``: 0 is uint8, 9 bfloat16.
        shape: Innermost dimension first.
        strides: In bytes, of all dimensions but the innermost; multiples of 16.
        box: What one copy moves, innermost first.
        swizzle: A ``CUtensorMapSwizzle``: 0 none, 1, 2, 3: 32, 64, 128 bytes.
        promotion: A ``CUtensorMapL2promotion``: 2 is 128 bytes.
    """
    rank = len(shape)
    memory = ctypes.create_string_buffer(192)
    start = -ctypes.addressof(memory) % 64  # the driver wants the result at a multiple of 64
    ones = (ctypes.c_uint32 * rank)(*[1] * rank)
    result: Any = ctypes.c_void_p(ctypes.addressof(memory) + start)
    status = driver().cuTensorMapEncodeTiled(
        result, dtype, rank, ctypes.c_void_p(address), (ctypes.c_uint64 * rank)(*shape),
        (ctypes.c_uint64 * max(rank - 1, 1))(*strides), (ctypes.c_uint32 * rank)(*box), ones,
        0, swizzle, promotion, 0,
    )  # fmt: skip
    check(f"cuTensorMapEncodeTiled of shape {shape}, strides {strides}, box {box}", status)
    return memory.raw[start : start + 128]

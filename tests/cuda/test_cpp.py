"""Building CUDA C++: compilers, the cache on disk, errors in plain words."""

from __future__ import annotations

import ctypes
import os
import stat
import struct
import subprocess
import sys
from types import SimpleNamespace

import pytest

import hwfuse.testing
from hwfuse import ColdCallInCapture, _compilers, _cuda, _packages
from hwfuse._cli import doctor
from hwfuse._compilers import Compiler
from hwfuse_cuda import _compile, _cpp, _driver
from hwfuse_cuda._cubin import parameter_sizes

TINY = """
extern "C" __global__ void scale(float* x, float factor, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] *= factor * TWICE;
}
"""
# Counts how often it is called, takes long enough to be overtaken, and "compiles" by copying.
FAKE = """#!/bin/sh
case "$*" in *--version*) echo "release 12.4, V12.4.1"; exit;; esac
echo call >> {folder}/calls
sleep 0.2
while [ $# -gt 1 ]; do [ "$1" = -o ] && out=$2; shift; done
grep -q BROKEN "$1" && {{ echo "kernel.cu(7): error: no such thing"; exit 1; }}
cp "$1" "$out"
"""
COMPILE = """
import sys
from pathlib import Path
from hwfuse_cuda import _compile
from hwfuse._compilers import Compiler
_compile.SOURCES = Path(sys.argv[1])
_compile.compilers = lambda: (Compiler("nvcc", sys.argv[1] + "/nvcc", "12.4"),)
print(len(_compile.cubin("tiny.cu", "sm90a")))
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A folder with a source and the one compiler that is found, and a cache of its own."""
    (tmp_path / "tiny.cu").write_text(TINY)
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(FAKE.format(folder=tmp_path))
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(_compile, "SOURCES", tmp_path)
    one = Compiler("nvcc", str(nvcc), "12.4")
    monkeypatch.setattr(_compile, "compilers", lambda: (one,))
    return tmp_path


def calls(folder):
    """Return how often the compiler ran."""
    path = folder / "calls"
    return len(path.read_text().splitlines()) if path.exists() else 0


def processes(folder, count):
    """Compile in several processes at once; return what each printed."""
    command = [sys.executable, "-c", COMPILE, str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
        for _ in range(count)
    ]
    return [one.communicate(timeout=120)[0].strip() for one in started]


def test_cubin_in_several_processes_at_once_is_compiled_once(fake):
    """The others wait and read the cache, and so does a process that comes later."""
    assert len(set(processes(fake, 2))) == 1
    assert calls(fake) == 1
    _compile.cubin("tiny.cu", "sm90a")
    assert calls(fake) == 1


def test_cubin_of_other_source_arch_macros_or_compiler_is_another(fake, monkeypatch):
    """Each is part of the key."""
    codes = [("sm90", None), ("sm90a", None), ("sm90", {"TWICE": 2})]
    for arch, defines in codes:
        _compile.cubin("tiny.cu", arch, defines)
    (fake / "tiny.cu").write_text(TINY + "// edited")
    _compile.cubin("tiny.cu", "sm90")
    newer = Compiler("nvcc", str(fake / "nvcc"), "12.5")
    monkeypatch.setattr(_compile, "compilers", lambda: (newer,))
    _compile.cubin("tiny.cu", "sm90")
    assert calls(fake) == 5


def test_cubin_with_broken_cached_file_is_compiled_again(fake):
    """A file cut off half way is noticed, not loaded."""
    whole = _compile.cubin("tiny.cu", "sm90")
    (path,) = (fake / "cache" / "hwfuse").glob("*.cubin")
    path.write_bytes(path.read_bytes()[:-10])
    assert _compile.read_cached(path) is None
    assert _compile.cubin("tiny.cu", "sm90") == whole
    assert calls(fake) == 2
    assert _compile.read_cached(path) == whole


def test_cubin_without_writable_cache_compiles_each_time(fake, monkeypatch):
    """A home that cannot be written to costs time, nothing else."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert _compile.cubin("tiny.cu", "sm90") == _compile.cubin("tiny.cu", "sm90")
    assert calls(fake) == 2


def test_cubin_of_wrong_source_shows_the_error_and_how_to_repeat_it(fake):
    """The compiler's words, and a command that can be typed."""
    (fake / "tiny.cu").write_text(TINY + "BROKEN")
    with pytest.raises(_compile.CompileError) as caught:
        _compile.cubin("tiny.cu", "sm90a", {"TWICE": 2})
    text = str(caught.value)
    assert text.startswith("tiny.cu does not compile for sm90a.\nnvcc 12.4 at ")
    assert "kernel.cu(7): error: no such thing" in text
    command = text.partition("To repeat: ")[2]
    assert command.startswith("nvcc -cubin -arch=sm_90a ")
    assert command.endswith(f"-DTWICE=2 {fake}/tiny.cu")


def test_cubin_refused_by_the_first_compiler_comes_from_the_second(fake, monkeypatch):
    """An nvcc that is too old, or without a host compiler, is no obstacle where NVRTC is."""
    pair = (Compiler("nvcc", "/bin/false", "11.0"), Compiler("nvcc", str(fake / "nvcc"), "12.4"))
    monkeypatch.setattr(_compile, "compilers", lambda: pair)
    _compile.cubin("tiny.cu", "sm90a")
    _compile.cubin("tiny.cu", "sm90a")
    assert calls(fake) == 1


def test_expand_puts_included_files_in_place(fake):
    """One text, so that it is the whole key and needs no include path; lines keep their names."""
    (fake / "a.cuh").write_text("int a;")
    (fake / "b.cu").write_text('// b\n#include "a.cuh"\nint b;')
    text = '#line 1 "b.cu"\n// b\n#line 1 "a.cuh"\nint a;\n#line 3 "b.cu"\nint b;'
    assert _compile.expand("b.cu") == text


def test_missing_compiler_is_a_reason(monkeypatch):
    """What an implementation that asks for one is rejected with, and what would repair it."""
    monkeypatch.setattr(_compilers, "compilers", tuple)
    _packages.missing.cache_clear()
    reason = _packages.missing("cuda-compiler>=12.0")
    assert reason == (
        "needs cuda-compiler>=12.0; neither nvcc nor NVRTC was found: "
        "pip install nvidia-cuda-nvrtc, or the CUDA toolkit's nvcc"
    )
    _packages.missing.cache_clear()
    monkeypatch.setattr(_compile, "compilers", tuple)
    with pytest.raises(_compile.CompileError, match="neither nvcc nor NVRTC"):
        _compile.cubin("tiny.cu", "sm90")


def test_doctor_names_the_compilers_and_the_cache(fake, monkeypatch):
    """What will compile, in this order, and what was compiled; or that nothing can."""
    _compile.cubin("tiny.cu", "sm90")
    size = f"1 compiled kernels, 0.0 MB in {fake}/cache/hwfuse"
    assert doctor.examine()["versions"]["its cache"] == size
    pair = (Compiler("nvcc", "/a/nvcc", "12.4"), Compiler("nvrtc", "/b/libnvrtc.so.12", "12.8"))
    monkeypatch.setattr(_compilers, "compilers", lambda: pair)
    text = "nvcc 12.4 at /a/nvcc; then nvrtc 12.8 at /b/libnvrtc.so.12"
    assert doctor.examine()["versions"]["CUDA C++"] == text
    monkeypatch.setattr(_compilers, "compilers", tuple)
    text = "no compiler: neither nvcc nor NVRTC was found"
    assert doctor.examine()["versions"]["CUDA C++"] == text


def test_call_of_cpu_tensors_that_pretend_is_refused_with_the_reason():
    """Machine code cannot be interpreted: the call goes to who can run on the CPU."""
    call = hwfuse.op("w4a8_moe_prep").spec.make_inputs(m=2)
    with hwfuse.testing.pretend("cuda:sm90"):
        decision = hwfuse.explain("w4a8_moe_prep", **call)
    text = "needs cuda-compiler>=12.0 and a GPU; the tensors are on the CPU"
    assert decision.rejected["cuda/cpp"] == (text,)


def test_missing_newer_compiler_names_the_one_found(monkeypatch):
    """One that is too old is a reason as well."""
    old = Compiler("nvcc", "nvcc", "11.8")
    monkeypatch.setattr(_compilers, "compilers", lambda: (old,))
    _packages.missing.cache_clear()
    assert _packages.missing("cuda-compiler>=12.0").endswith("found cuda-compiler 11.8")
    _packages.missing.cache_clear()


def test_compilers_in_pip_folders_are_found(tmp_path, monkeypatch):
    """NVRTC beside torch: its version from the file names, without loading it."""
    folder = tmp_path / "cu12" / "lib"
    folder.mkdir(parents=True)
    for name in ("libnvrtc.so.12", "libnvrtc-builtins.so.12.8"):
        (folder / name).touch()
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(_compilers.importlib.util, "find_spec", lambda _name: spec)
    monkeypatch.setattr(_compilers, "_nvcc", list)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    found = Compiler("nvrtc", str(folder / "libnvrtc.so.12"), "12.8")
    assert _compilers.compilers.__wrapped__() == (found,)


def test_arguments_lie_where_the_kernel_reads_them():
    """Sizes and alignment as C has them; what does not fit is an error."""
    arguments = _driver.Arguments(("P", "i", "f", "q", "128s", "i"))
    arguments.pack(arguments.memory, 0, 1 << 40, -1, 0.5, 1 << 40, b"x" * 128, 7)
    start = arguments.pointers[0]
    assert [place - start for place in arguments.pointers] == [0, 8, 12, 16, 24, 152]
    with pytest.raises(struct.error, match="2147483647"):
        arguments.pack(arguments.memory, 0, 1, 1 << 31, 0.5, 0, b"", 0)


class FakeDriver:
    """Stands in for libcuda: loads anything, and notes what a launch would read."""

    def __init__(self):
        self.launches, self.entered, self.refusals = [], 0, 0

    def cuCtxSetCurrent(self, _context):  # noqa: N802
        """Count, so that entering shows."""
        self.entered += 1
        return 0

    def cuLaunchKernelEx(self, config, _function, pointers, _extra):  # noqa: N802
        """Read the configuration and the arguments (P, f, i) as the driver would."""
        if self.refusals:
            self.refusals -= 1
            return 201
        raw = config._obj
        kinds = (ctypes.c_void_p, ctypes.c_float, ctypes.c_int)
        values = [kind.from_address(at).value for kind, at in zip(kinds, pointers, strict=True)]
        attributes = [raw.attributes[i].id for i in range(raw.num_attributes)]
        grid, block = list(raw.grid), list(raw.block)
        self.launches.append((grid, block, raw.shared, raw.stream, attributes, values))
        return 0

    def __getattr__(self, _name):
        """Every other call succeeds."""
        return lambda *_arguments: 0


@pytest.fixture
def driver(monkeypatch):
    """The fake driver, and a device with PDL whose current stream is 77."""
    one = FakeDriver()
    monkeypatch.setattr(_driver, "driver", lambda: one)
    monkeypatch.setattr(_cuda, "refuse_capture", lambda _name: None)
    monkeypatch.setattr(_cuda, "vendor_and_arch", lambda _device: ("nvidia", "sm90"))
    monkeypatch.setattr(_compile, "cubin", lambda *_arguments: b"")
    monkeypatch.setattr(_driver, "parameter_sizes", lambda *_arguments: None)
    monkeypatch.setattr(_cpp, "has_pdl", lambda _device: True)
    monkeypatch.setattr(_cpp, "_stream", lambda _device: 77)
    yield one
    _driver.module.cache_clear()
    _driver._context.cache_clear()


def test_kernel_launch_hands_over_grid_stream_and_arguments(driver):
    """What the driver reads is what was passed, with the attributes of the options."""
    kernel = _cpp.Kernel("x.cu", "x", ("P", "f", "i"), block=96, shared=64, pdl=True, cluster=4)
    kernel(0, 8, 1 << 40, 0.5, -3)
    kernel(0, 12, 16, 1.5, 4)
    assert driver.launches == [
        ([8, 1, 1], [96, 1, 1], 64, 77, [4, 6], [1 << 40, 0.5, -3]),
        ([12, 1, 1], [96, 1, 1], 64, 77, [4, 6], [16, 1.5, 4]),
    ]
    assert driver.entered == 1


def test_kernel_launch_in_a_fresh_thread_enters_the_context(driver):
    """A thread without one is refused once; the launch is repeated inside torch's."""
    kernel = _cpp.Kernel("x.cu", "x", ("P", "f", "i"), block=32)
    kernel(0, 1, 0, 0.0, 0)
    driver.refusals = 1
    kernel(0, 2, 0, 0.0, 0)
    assert [launch[0][0] for launch in driver.launches] == [1, 2]
    assert driver.entered == 2
    driver.refusals = 2
    with pytest.raises(_driver.DriverError, match=r"cuLaunchKernelEx failed with .* \(201\)"):
        kernel(0, 3, 0, 0.0, 0)


def test_kernel_launch_on_a_device_without_pdl_leaves_it_out(driver, monkeypatch):
    """Before sm90 there is none; other attributes stay."""
    monkeypatch.setattr(_cpp, "has_pdl", lambda _device: False)
    kernel = _cpp.Kernel("x.cu", "x", ("P", "f", "i"), block=32, pdl=True, cluster=2)
    kernel(0, 2, 0, 0.0, 0)
    assert driver.launches[0][4] == [4]


def test_kernel_with_other_parameters_than_its_types_is_refused(driver, monkeypatch):
    """One argument too few would be read from what lies behind the others."""
    monkeypatch.setattr(_driver, "parameter_sizes", lambda *_arguments: [8, 4, 4, 4])
    kernel = _cpp.Kernel("x.cu", "x", ("P", "f", "i"), block=32)
    with pytest.raises(_driver.DriverError, match=r"takes arguments of \[8, 4, 4, 4\] bytes"):
        kernel(0, 1, 0, 0.0, 0)
    assert not driver.launches


@pytest.mark.parametrize("number", [2, 3, 7, 56, 60, 1000, (1 << 20) + 1, (1 << 31) - 1])
def test_divisor_multiplies_to_the_quotient(number):
    """Exact for every n below 2**31: tried around multiples, where it would be off first."""
    factor, shift = _cpp.divisor(number)
    last = (1 << 31) - 1
    multiples = {i * number for i in (1, 2, 3, 1000, last // number)}
    for n in {0, last, *multiples, *(one - 1 for one in multiples)}:
        if n <= last:
            assert (n * factor >> 32) >> shift == n // number


def test_first_launch_in_a_capture_is_refused(monkeypatch):
    """Nothing is compiled or loaded there, whatever path the call took."""
    monkeypatch.setattr(_cuda.torch.cuda, "is_current_stream_capturing", lambda: True)
    kernel = _cpp.Kernel("tiny.cu", "scale", ("P", "f", "i"), block=32)
    with pytest.raises(ColdCallInCapture, match=r"scale in tiny\.cu"):
        kernel(0, 1, 0, 1.0, 0)


def test_cubin_from_nvrtc_has_the_kernel_and_its_parameters(tmp_path, monkeypatch):
    """What the driver would load: machine code under the plain C name."""
    found = [one for one in _compilers.compilers() if one.kind == "nvrtc"]
    if not found:
        pytest.skip("NVRTC is not installed")
    (tmp_path / "tiny.cu").write_text(TINY)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_compile, "SOURCES", tmp_path)
    monkeypatch.setattr(_compile, "compilers", lambda: tuple(found))
    code = _compile.cubin("tiny.cu", "sm90a", {"TWICE": 2})
    assert parameter_sizes(code, "scale") == [8, 4, 4]
    with pytest.raises(_compile.CompileError, match='identifier "TWICE" is undefined'):
        _compile.cubin("tiny.cu", "sm90a")

"""What compiles CUDA C++ here, and where the results are kept; found without loading CUDA.

``nvcc`` wants a host compiler beside it; NVRTC, the library that torch's CUDA wheels bring, wants
nothing.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# What stands in REQUIRES["packages"], as if it were one: "cuda-compiler>=12.0".
NAME = "cuda-compiler"
INSTALL = "pip install nvidia-cuda-nvrtc, or the CUDA toolkit's nvcc"


@dataclass(frozen=True)
class Compiler:
    """One compiler: ``nvcc`` or ``nvrtc``, its file, and its version as ``13.0``."""

    kind: str
    path: str
    version: str

    def __str__(self) -> str:
        return f"{self.kind} {self.version} at {self.path}"


@functools.cache
def compilers() -> tuple[Compiler, ...]:
    """Return what can compile CUDA C++ here, most preferred first: at most one of each kind."""
    nvcc = (Compiler("nvcc", path, version) for path in _nvcc() if (version := _release(path)))
    nvrtc = (Compiler("nvrtc", str(path), _library_version(path)) for path in _nvrtc())
    return tuple(one for one in (next(nvcc, None), next(nvrtc, None)) if one)


def cache_folder() -> Path:
    """Return where compiled kernels are kept: ``hwfuse`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "hwfuse")


def _toolkits() -> list[Path]:
    """Return the roots of CUDA installations: the one that the user names, pip's, the usual one."""
    roots = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    spec = importlib.util.find_spec("nvidia")
    wheels = [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
    pip = sorted((path for folder in wheels for path in folder.iterdir()), reverse=True)
    return [*map(Path, roots), *pip, Path("/usr/local/cuda")]


def _nvcc() -> Iterator[str]:
    if not shutil.which("gcc"):
        return  # nvcc lets the host's compiler preprocess
    if on_path := shutil.which("nvcc"):
        yield on_path
    for root in _toolkits():
        if (path := root / "bin" / "nvcc").is_file():
            yield str(path)


def _nvrtc() -> Iterator[Path]:
    for root in _toolkits():
        for folder in ("lib", "lib64"):
            yield from sorted((root / folder).glob("libnvrtc.so.*"), reverse=True)


def _release(nvcc: str) -> str:
    """Return what ``nvcc --version`` calls its release; empty if it cannot run."""
    try:
        done = subprocess.run(
            [nvcc, "--version"], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    match = re.search(r"release (\d+\.\d+)", done.stdout)
    return match[1] if match else ""


def _library_version(nvrtc: Path) -> str:
    """Return NVRTC's version without loading it; the library beside it has the minor number too."""
    version = nvrtc.name.partition(".so.")[2]
    beside = nvrtc.parent.glob(f"libnvrtc-builtins.so.{version}*")
    return max((path.name.partition(".so.")[2] for path in beside), key=len, default=version)

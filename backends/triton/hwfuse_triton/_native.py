"""The C half of launching: compiled once with the compiler that Triton needs too, and cached.

Without a compiler, without NVIDIA's driver, on a Python without a GIL, or with
HWFUSE_LAUNCH=python, everything works without it; `hwfuse doctor` says why it is not used.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch

from hwfuse._compilers import cache_folder
from hwfuse_triton import _private

_SOURCE = Path(__file__).with_name("_native.c")
_DRIVER = "libcuda.so.1"
_CUDA = 2  # kDLCUDA
_problem: str | None = "not needed yet"


def problem() -> str | None:
    """Say why the C half is not in use; None if it is."""
    return _problem


def load() -> Any:
    """Return the C module, ready for the GPUs of this process, or None; never raises."""
    global _problem  # noqa: PLW0603
    try:
        module = _ready()
    except Exception as error:  # noqa: BLE001 - the launch in Python is as right
        detail = getattr(error, "stderr", None) or error
        _problem = f"{type(error).__name__}: {detail}"
        return None
    _problem = None
    return module


@functools.cache
def _ready() -> Any:
    hooks = _private.hooks()
    if hooks is None or not _private.empty_strided_cuda or not _private.mode_depth:
        raise RuntimeError(f"private names are gone: {', '.join(_private.missing())}")
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise RuntimeError("this Python has no GIL")
    ctypes.CDLL(_DRIVER)  # without it there is nothing to compile for
    module = build()
    module.setup(
        _DRIVER, _CUDA, _private.exchange_api, torch.Tensor, torch.nn.Parameter,
        _private.empty_strided_cuda, _private.mode_depth, hooks.knobs, hooks.enter, hooks.exit,
    )  # fmt: skip
    return module


def build() -> Any:
    """Return the compiled module, compiling it if the cache has none for this Python."""
    source = _SOURCE.read_bytes()
    about = f"{sys.version} {platform.platform()} {sysconfig.get_config_var('EXT_SUFFIX')}"
    key = hashlib.sha256(source + about.encode()).hexdigest()[:16]
    path = cache_folder() / "launch" / f"_native-{key}.so"
    if not path.is_file():
        _compile(path)
    loader = importlib.machinery.ExtensionFileLoader("_native", str(path))
    spec = importlib.util.spec_from_loader("_native", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _compile(path: Path) -> None:
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        raise FileNotFoundError("no C compiler: neither $CC nor gcc nor clang")
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("not compiled inside a CUDA graph capture")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder, path.name)
        include = sysconfig.get_paths()["include"]
        command = [*compiler.split(), "-O2", "-shared", "-fPIC", f"-I{include}", str(_SOURCE),
                   "-o", str(built), "-ldl"]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        built.replace(path)  # another process may do the same: each replaces a whole file

"""What a result belongs to: the device, its driver, the versions, the day."""

from __future__ import annotations

import datetime as dt
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata

import torch

import hwfuse
from hwfuse._bench import peers

_MODULES = {"compile": "torch", "deepgemm": "deep_gemm"}
_PACKAGES = ("triton", "sglang", "sglang-kernel", "flashinfer-python", "deep_gemm")


def this_machine() -> dict[str, str]:
    """Return name and value of everything that a time may depend on."""
    found = {
        "device": torch.cuda.get_device_name(),
        "driver": _driver(),
        "hwfuse": hwfuse.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
    }
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def missing(libraries: Sequence[str]) -> dict[str, str]:
    """Return why each library that cannot be imported cannot."""
    found = {}
    for library in libraries:
        try:
            peers.load(_MODULES.get(library, library))
        except peers.Missing as reason:
            found[library] = str(reason)
    return found


def _driver() -> str:
    if torch.version.hip is not None:
        return f"HIP {torch.version.hip}"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.splitlines()[0].strip()


def command() -> str:
    """Return the command line as a user types it."""
    return " ".join(["hwfuse", *sys.argv[1:]])

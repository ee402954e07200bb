"""Which packages are installed, without importing them."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import re
from pathlib import Path

import torch

from hwfuse import _compilers
from hwfuse._implementation import parse_requirement


@functools.cache
def missing(requirement: str, pretended: bool = False) -> str | None:  # noqa: FBT001, FBT002
    """Say what is wrong with a package requirement such as ``triton>=3.6`` here, or return None.

    *pretended*: tensors of the CPU count as a GPU's; Triton can interpret, machine code cannot run.
    """
    name, minimum = parse_requirement(requirement)
    if name == _compilers.NAME and pretended:
        return f"needs {requirement} and a GPU; the tensors are on the CPU"
    version = installed(name)
    if version is None and name == _compilers.NAME:
        return f"needs {requirement}; neither nvcc nor NVRTC was found: {_compilers.INSTALL}"
    if version is None:
        return f"needs {requirement}; {name} is not installed"
    if minimum and _numbers(version) < _numbers(minimum):
        return f"needs {requirement}; found {name} {version}"
    return None


def installed(name: str) -> str | None:
    """Return the version of a package, by distribution or module name; None if it is absent."""
    if name == _compilers.NAME:
        versions = [one.version for one in _compilers.compilers()]
        return max(versions, key=_numbers, default=None)
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
    if name == "rocm":
        return torch.version.hip
    if not _is_module(name):
        return None
    # ROCm's torch brings the module triton in a distribution of another name.
    owners = importlib.metadata.packages_distributions().get(name.partition(".")[0], [])
    return importlib.metadata.version(owners[0]) if owners else "0"


def _is_module(name: str) -> bool:
    """Look for ``triton`` or ``aiter.ops.new``; the latter by its file, without importing aiter."""
    package, *rest = name.split(".")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not rest:
        return spec is not None
    return any(
        Path(folder, *rest).with_suffix(".py").is_file() or Path(folder, *rest).is_dir()
        for folder in spec.submodule_search_locations or ()
    )


def _numbers(version: str) -> tuple[int, ...]:
    """Return the release part: 3.6, 3.6.0 and 3.6rc1 are one, 3.10 is more."""
    release = re.match(r"[\d.]*", version)
    numbers = [int(number) for number in release[0].split(".") if number] if release else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)

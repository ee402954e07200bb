"""Which packages are installed, without importing them."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import re

from hwfuse._implementation import parse_requirement


@functools.cache
def missing(requirement: str) -> str | None:
    """Say what is wrong with a package requirement such as ``triton>=3.6`` here, or return None."""
    name, minimum = parse_requirement(requirement)
    version = installed(name)
    if version is None:
        return f"needs {requirement}; {name} is not installed"
    if minimum and _numbers(version) < _numbers(minimum):
        return f"needs {requirement}; found {name} {version}"
    return None


def installed(name: str) -> str | None:
    """Return the version of a package, by distribution or module name; None if it is absent."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
    # ROCm's torch brings the module triton in a distribution of another name.
    if not name.isidentifier() or importlib.util.find_spec(name) is None:
        return None
    owners = importlib.metadata.packages_distributions().get(name, [])
    return importlib.metadata.version(owners[0]) if owners else "0"


def _numbers(version: str) -> tuple[int, ...]:
    """Return the release part: 3.6, 3.6.0 and 3.6rc1 are one, 3.10 is more."""
    release = re.match(r"[\d.]*", version)
    numbers = [int(number) for number in release[0].split(".") if number] if release else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)

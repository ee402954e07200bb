"""What the ops are measured beside: one file per library, each of which may be missing.

A peer is prepared with the arguments of one call of the op and gives a function without arguments:
what a user of that library runs instead of the op.  Conversions that a user makes once, when a
model is loaded, belong to the preparation.  The function returns the op's outputs in its order,
None for one that the library does not give.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hwfuse._errors import InputError, suggestion

LIBRARIES = ("torch", "compile", "sglang", "flashinfer", "deepgemm")

Comparator = tuple[str, dict[str, Any]]
Prepare = Callable[[Mapping[str, Any]], Callable[[], Any]]

# Scales by fast division, or of a norm that was rounded before: some codes are one off.
ROUNDED_TWICE: Mapping[str, Comparator] = {
    "q": ("fp8_codes", {"max_codes": 2, "share": 0.15}),
    "scale": ("rel_frobenius", {"bound": 1e-2}),
    "norm": ("rel_frobenius", {"bound": 1e-2}),
}


class Missing(Exception):
    """A library, or the part of it that this call needs, is not here; the text says why."""


@dataclass(frozen=True)
class Peer:
    """One way to get an op's result; *tolerance* replaces the op's COMPARE where it differs."""

    op: str
    name: str
    prepare: Prepare
    note: str = ""
    tolerance: Mapping[str, Comparator] = field(default_factory=dict)


class Registry:
    """The peers of one library."""

    def __init__(self, library: str) -> None:
        self.library = library
        self.peers: list[Peer] = []

    def add(
        self,
        *ops: str,
        name: str = "",
        note: str = "",
        tolerance: Mapping[str, Comparator] | None = None,
    ) -> Callable[[Prepare], Prepare]:
        """Add a preparation, for each op that it serves."""

        def keep(prepare: Prepare) -> Prepare:
            text = f"{self.library}: {name}" if name else self.library
            self.peers += [Peer(op, text, prepare, note, tolerance or {}) for op in ops]
            return prepare

        return keep


def of(op: str, libraries: Sequence[str]) -> list[Peer]:
    """Return an op's peers in these libraries; nothing of them is imported yet."""
    found: list[Peer] = []
    for library in libraries:
        module: Any = importlib.import_module(f"{__name__}.{library}_peer")
        found += [peer for peer in module.registry.peers if peer.op == op]
    return found


def read(words: str) -> tuple[str, ...]:
    """Read what ``--against`` gives: names with commas between them, or none."""
    if words == "none":
        return ()
    names = tuple(words.split(","))
    for name in names:
        if name not in LIBRARIES:
            needed = f"none, or of {', '.join(LIBRARIES)}"
            raise InputError("--against", f"{name!r}{suggestion(name, LIBRARIES)}", needed)
    return names


@functools.cache
def load(module: str) -> Any:
    """Import a module of a library; `Missing` if that fails, whatever it raises."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # built for another torch it raises anything
        raise Missing(f"{module} cannot be imported: {brief(error)}") from error


def brief(error: BaseException) -> str:
    """Return the first lines of an error, with its type, short enough for a table."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words}"[:300]

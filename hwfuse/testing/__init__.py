"""Tools that prove implementations right, for us and for outside backends.

Each name is imported when it is first used; pytest, Triton and torch's compiler wait for longer.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hwfuse.testing._cases import ParityError
    from hwfuse.testing._in_memory import implementation
    from hwfuse.testing._interpreter import CORRECTIONS
    from hwfuse.testing._matrix import row
    from hwfuse.testing._pretend import pretend
    from hwfuse.testing.parity import Report, parity_tests, run

__all__ = [
    "CORRECTIONS",
    "ParityError",
    "Report",
    "implementation",
    "parity_tests",
    "pretend",
    "row",
    "run",
]

_HOMES = {
    "CORRECTIONS": "_interpreter",
    "ParityError": "_cases",
    "implementation": "_in_memory",
    "pretend": "_pretend",
    "row": "_matrix",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'hwfuse.testing' has no attribute {name!r}")
    home = importlib.import_module(f"hwfuse.testing.{_HOMES.get(name, 'parity')}")
    return getattr(home, name)

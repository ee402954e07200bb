"""hwfuse: one call, any accelerator, the fastest correct kernel, and the proof of it.

::

    import hwfuse

    split = hwfuse.op("fused_qkvzba")
    mixed_qkv, z, b, a = split(qkvz, ba, head_k_dim=128, head_v_dim=128)
    print(hwfuse.explain("fused_qkvzba", m=64, device="rocm:gfx950"))
"""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from hwfuse import _state, layouts
from hwfuse._decision import Decision
from hwfuse._device import fp8_dtype
from hwfuse._errors import (
    BrokenImplementation,
    ColdCallInCapture,
    ConfigError,
    HwfuseError,
    HwfuseWarning,
    InputError,
    IntegrationError,
    NoImplementation,
    PinnedUnavailable,
    UnknownImplementation,
    UnknownOp,
)
from hwfuse._op import Op, explain, op, scope
from hwfuse._plugins import Backend, hookimpl
from hwfuse._record import record
from hwfuse._spec import names as op_names
from hwfuse._state import configure
from hwfuse._warmup import warmup

if TYPE_CHECKING:
    from hwfuse import integrations, packing, testing

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "BrokenImplementation",
    "ColdCallInCapture",
    "ConfigError",
    "Decision",
    "HwfuseError",
    "HwfuseWarning",
    "InputError",
    "IntegrationError",
    "NoImplementation",
    "Op",
    "PinnedUnavailable",
    "UnknownImplementation",
    "UnknownOp",
    "configure",
    "decisions",
    "explain",
    "fp8_dtype",
    "hookimpl",
    "integrations",
    "layouts",
    "op",
    "op_names",
    "packing",
    "record",
    "testing",
    "using",
    "warmup",
]


def using(*everything: str, **ops: str | list[str]) -> AbstractContextManager[None]:
    """Choose implementations for a block of code, in this thread or task only.

    Args:
        *everything: One id for all ops (a pin), or several (an order).
        **ops: Op name to an id, which pins, or to a list of ids, which is an order.

    Raises:
        ConfigError: An op or id is unknown.
    """
    orders: dict[str, Any] = dict(ops)
    if everything:
        orders["*"] = everything[0] if len(everything) == 1 else everything
    return scope(orders, "hwfuse.using")


def decisions() -> list[Decision]:
    """Return what this process has used: one decision per op and kind of call, at first use."""
    return list(_state.decisions.values())


def __getattr__(name: str) -> Any:
    if name in ("integrations", "packing", "testing"):
        return importlib.import_module(f"hwfuse.{name}")
    raise AttributeError(f"module 'hwfuse' has no attribute {name!r}")

"""hwfuse: one call, any accelerator, the fastest correct kernel, and the proof of it.

::

    import hwfuse

    split = hwfuse.op("fused_qkvzba")
    mixed_qkv, z, b, a = split(qkvz, ba, head_k_dim=128, head_v_dim=128)
    print(hwfuse.explain("fused_qkvzba", m=64, device="rocm:gfx950"))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hwfuse import _state
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
from hwfuse._op import Op, op
from hwfuse._plugins import Backend, hookimpl
from hwfuse._spec import names as op_names

if TYPE_CHECKING:
    from hwfuse import integrations, layouts, nn, packing, testing
    from hwfuse._explain import explain
    from hwfuse._record import record
    from hwfuse._using import configure, using
    from hwfuse._warmup import warmup

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
    "nn",
    "op",
    "op_names",
    "packing",
    "record",
    "testing",
    "using",
    "warmup",
]


def decisions() -> list[Decision]:
    """Return what this process has used: one decision per op and kind of call, at first use."""
    return list(_state.decisions.values())


# Loaded when first used, so that one call loads what one call needs.
_LATER = {
    "configure": "hwfuse._using",
    "explain": "hwfuse._explain",
    "record": "hwfuse._record",
    "using": "hwfuse._using",
    "warmup": "hwfuse._warmup",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        value = getattr(importlib.import_module(_LATER[name]), name)
    elif name in ("integrations", "layouts", "nn", "packing", "testing"):
        value = importlib.import_module(f"hwfuse.{name}")
    else:
        raise AttributeError(f"module 'hwfuse' has no attribute {name!r}")
    globals()[name] = value
    return value

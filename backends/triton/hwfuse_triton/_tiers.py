"""What `hwfuse doctor` and `hwfuse bench dispatch` ask: how kernels are launched, and its cost."""

from __future__ import annotations

from typing import Any

import torch

from hwfuse import _spec, _state
from hwfuse_triton import _launch, _native, _private, _replay


def notes() -> list[str]:
    """Say which way kernels are launched here, and what stands in the way of a faster one.

    Kernels whose plans and ops whose replays were refused are those of this process.
    """
    tier, missing = _launch.tier(), _private.missing()
    if tier == "native" and not torch.version.hip:
        _native.load()
    if tier == "triton":
        text = "kernels are launched by Triton: HWFUSE_LAUNCH=triton"
    elif tier == "native" and not torch.version.hip and not _native.problem():
        text = "repeated calls are replayed in C"
    else:
        why = "HWFUSE_LAUNCH=python" if tier == "python" else _native.problem()
        why = "C is for NVIDIA" if torch.version.hip else why
        text = f"repeated calls are replayed in Python: {why}"
    found = [text]
    if missing:
        found.append(f"launches are slower than need be: no {', '.join(missing)}")
    for launch in list(_launch._all):  # noqa: SLF001 - the list is for this
        name = getattr(launch.kernel, "__name__", launch.kernel)
        found += [f"{name} is launched by Triton: {why}" for why in launch.refusals.values()]
    found += [f"some calls of {op} are not replayed: {why}" for op, why in _replay.refusals.items()]
    return found


def costs(identifier: str, rounds: int) -> dict[str, Any] | None:
    """Measure the ops that implementation *identifier* has and whose calls are replayed."""
    from hwfuse_triton import _costs

    functions = {}
    for op in _spec.names():
        one = _state.registry().implementations(op).get(identifier)
        if one is not None and hasattr(one.load(), "replays"):
            functions[op] = one.load()
    return _costs.launch_costs(functions, rounds) if functions else None

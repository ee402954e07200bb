"""`pretend`: let CPU tensors count as another device."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from hwfuse import _device, _state, _using


@contextmanager
def pretend(target: str) -> Iterator[None]:
    """Make CPU tensors count as *target* in this block: facts, arch, fp8 flavour, selection.

    Implementations run under their own ids; Triton kernels run in Triton's interpreter, whose
    wrong casts are corrected (`hwfuse.testing.CORRECTIONS`).  Decisions say ``pretended``.

    Args:
        target: ``"cuda:sm90"``, ``"rocm:gfx942"``, …
    """
    parsed = _device.parse(target)
    policy = _using.using_policy(_state.context.get(), (), f"pretend {parsed}")
    device_token = _device.pretended.set(parsed)
    policy_token = _state.context.set(policy)
    try:
        with _interpreter():
            yield
    finally:
        _state.context.reset(policy_token)
        _device.pretended.reset(device_token)


def _interpreter() -> AbstractContextManager[None]:
    if not all(map(importlib.util.find_spec, ("triton", "numpy"))):
        return nullcontext()  # Triton implementations are rejected: a package is missing
    from hwfuse.testing._interpreter import interpreted

    return interpreted()

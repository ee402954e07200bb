"""`implementation`: an implementation without a file, for as long as a block runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import hwfuse
from hwfuse import _state
from hwfuse._implementation import Implementation, parse_requires


@contextmanager
def implementation(
    op: str,
    id: str,  # noqa: A002 - it is called that everywhere
    function: Callable[..., Any],
    *,
    requires: Mapping[str, Any] | None = None,
    vendor: str | None = None,
) -> Iterator[Implementation]:
    """Register *function* as one more implementation, for tests and demonstrations.

    Args:
        op: The op's name.
        id: ``"backend/provider"``; the backend need not exist.
        function: Takes what the op takes.
        requires: What a file would declare as ``REQUIRES``.
        vendor: ``"nvidia"``, ``"amd"``, a torch device type, or None for every device.

    Yields:
        Its record.

    Raises:
        ValueError: The id is taken, or *requires* is wrong.
    """
    parsed = parse_requires(requires or {}, hwfuse.op(op).spec)
    module = function.__module__
    record = Implementation(id, op, vendor, module, None, parsed, function=function)
    registry = _state.registry()
    if id in registry.implementations(op):
        raise ValueError(f"{id} already implements {op}")
    registry.added.setdefault(op, {})[id] = record
    _state.forget()
    try:
        yield record
    finally:
        del registry.added[op][id]
        _state.forget()

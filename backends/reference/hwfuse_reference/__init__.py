"""The reference backend: every op in plain PyTorch, on any device; the oracle of parity."""

from __future__ import annotations

import hwfuse


@hwfuse.hookimpl
def hwfuse_backend() -> hwfuse.Backend:
    """Name the backend, its folders and its providers."""
    return hwfuse.Backend(
        name="reference",
        package="hwfuse_reference",
        vendor=None,
        providers={"torch": ()},
    )

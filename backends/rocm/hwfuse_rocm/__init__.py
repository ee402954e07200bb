"""The AMD backend."""

from __future__ import annotations

import hwfuse


@hwfuse.hookimpl
def hwfuse_backend() -> hwfuse.Backend:
    """Name the backend, its folders, and its providers with the distributions they need."""
    return hwfuse.Backend(
        name="rocm",
        package="hwfuse_rocm",
        vendor="amd",
        providers={
            # The distribution called plain "aiter" is somebody else's async iterators.
            "aiter": ("amd-aiter",),
            "ck": ("amd-aiter",),  # aiter is what builds and binds Composable Kernel for Python
            "triton": ("triton>=3.6",),
        },
    )

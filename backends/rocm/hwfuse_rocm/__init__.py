"""The AMD backend."""

from __future__ import annotations

from typing import Any

import torch

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


def launch_notes() -> list[str]:
    """Say for `hwfuse doctor` which way kernels are launched here."""
    if not torch.cuda.is_available() or not torch.version.hip:
        return []
    from hwfuse_triton import _tiers

    return _tiers.notes()


def launch_costs(rounds: int) -> dict[str, Any] | None:
    """Measure for `hwfuse bench dispatch` what launching costs the host."""
    if not torch.version.hip:
        return None
    from hwfuse_triton import _tiers

    return _tiers.costs("rocm/triton", rounds)

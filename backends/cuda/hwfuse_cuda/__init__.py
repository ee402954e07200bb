"""The NVIDIA backend."""

from __future__ import annotations

from typing import Any

import torch

import hwfuse


@hwfuse.hookimpl
def hwfuse_backend() -> hwfuse.Backend:
    """Name the backend, its folders, and its providers with the distributions they need."""
    return hwfuse.Backend(
        name="cuda",
        package="hwfuse_cuda",
        vendor="nvidia",
        providers={
            "cpp": (),  # CUDA C++ of our own, compiled on this machine
            "cutlass": ("nvidia-cutlass-dsl",),
            "deepgemm": ("deep_gemm",),
            "triton": ("triton>=3.6",),
            "cublas": (),  # through torch, which links it
        },
    )


def launch_notes() -> list[str]:
    """Say for `hwfuse doctor` which way kernels are launched here."""
    if not torch.cuda.is_available() or not torch.version.cuda:
        return []
    from hwfuse_triton import _tiers

    return _tiers.notes()


def launch_costs(rounds: int) -> dict[str, Any] | None:
    """Measure for `hwfuse bench dispatch` what launching costs the host."""
    if not torch.version.cuda:
        return None
    from hwfuse_triton import _tiers

    return _tiers.costs("cuda/triton", rounds)

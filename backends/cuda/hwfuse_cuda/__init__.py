"""The NVIDIA backend."""

from __future__ import annotations

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

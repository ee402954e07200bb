"""Launching Triton kernels, and the memory that they write.

An op's file makes a `Launch` per combination of constants, keeps it (`functools.cache`) and calls
it with the number of programs and the kernel's other arguments.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor


class Launch:
    """A kernel with its constants and options.

    Args:
        kernel: A ``@triton.jit`` function.  Its integer arguments are in ``do_not_specialize``,
            fit 32 bits, and nothing is assumed of them; its tensors begin at multiples of 16
            bytes, or the launch is an ordinary one.
        num_warps: Warps per program, of 32 threads on NVIDIA, 64 on AMD.
        pdl: Programmatic dependent launch: the kernel may start before the one before it has
            ended, and waits itself.  The kernel has a constant ``PDL`` that says so.
        options: Other options of Triton: ``num_stages``, ``maxnreg``, ``waves_per_eu``.
        constants: The kernel's ``tl.constexpr`` arguments.
    """

    def __init__(
        self,
        kernel: Any,
        *,
        num_warps: int,
        pdl: bool | None = None,
        options: dict[str, Any] | None = None,
        **constants: Any,
    ) -> None:
        self.kernel = kernel
        self.keywords = {**constants, **(options or {}), "num_warps": num_warps}
        if pdl is not None:
            self.keywords["PDL"] = pdl
        if pdl:
            self.keywords["launch_pdl"] = True

    def __call__(self, programs: int, *arguments: Tensor | float) -> None:
        """Run *programs* programs; *arguments*: the kernel's, up to its first constant."""
        self.kernel[(programs,)](*arguments, **self.keywords)


@functools.cache
def has_pdl(index: int) -> bool:
    """Say whether kernels on device *index* can start before the one they depend on has ended.

    The CPU's index is -1.
    """
    return (
        index >= 0
        and torch.version.hip is None
        and torch.cuda.get_device_capability(index) >= (9, 0)
    )


def empty(
    like: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    strides: tuple[int, ...] | None = None,
) -> Tensor:
    """Allocate an output on the device of *like*, contiguous unless *strides* says otherwise."""
    if strides is None:
        return torch.empty(shape, dtype=dtype, device=like.device)
    return torch.empty_strided(shape, strides, dtype=dtype, device=like.device)

"""Seeded tensors for the `make_inputs` of specs: equal numbers on every device, none on meta."""

from __future__ import annotations

import torch
from torch import Tensor


class Random:
    """Draws on the CPU and moves the result; on meta it only allocates."""

    def __init__(self, seed: int, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return signed numbers of mean 0 and deviation 1."""
        if self.device.type == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        return torch.randn(shape, generator=self._generator, dtype=torch.float32, device="cpu").to(
            self.device, dtype
        )

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype) -> Tensor:
        """Return whole numbers, *low* up to but without *high*."""
        if self.device.type == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        return torch.randint(low, high, shape, generator=self._generator, device="cpu").to(
            self.device, dtype
        )

    def rows(self, m: int, width: int, *, row_pad: int, dtype: torch.dtype) -> Tensor:
        """Return `normal` ``[m, width]`` as the first columns of rows that are *row_pad* longer."""
        return self.normal(m, width + row_pad, dtype=dtype)[:, :width]

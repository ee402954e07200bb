"""Tensors in poisoned memory, so that a stray read, a stray write or an unwritten element shows."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hwfuse.testing.compare import bits

_GUARD = 1024  # bytes on each side; keeps every alignment a kernel may ask for


class Memory:
    """A copy of a call's tensors: equal values, strides, alignment and sharing of storage.

    Around and between them lies poison: NaN, or the largest integer.  So whoever reads padding or
    a row past the last one computes nonsense, and whoever writes there is found out by `written`.

    Attributes:
        arguments: The call's arguments, with the copies in place of its tensors.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self.arguments = dict(arguments)
        # Of each storage: the memory, its content before the call, the arguments in it.
        self._blocks: list[tuple[Tensor, Tensor, list[str]]] = []
        for names in _by_storage(arguments).values():
            block = self._move(names, arguments)
            self._blocks.append((block, block.clone(), names))

    def _move(self, names: list[str], arguments: Mapping[str, Any]) -> Tensor:
        first = arguments[names[0]]
        size = max(arguments[name].untyped_storage().nbytes() for name in names)
        num_bytes = (size + 3 * _GUARD - 1) // _GUARD * _GUARD
        block = torch.empty(num_bytes, dtype=torch.uint8, device=first.device)
        nothing = torch.nan if first.is_floating_point() else torch.iinfo(first.dtype).max
        block.view(first.dtype).fill_(nothing)
        for name in names:
            tensor = arguments[name]
            offset = tensor.storage_offset() + _GUARD // tensor.element_size()
            copy = block.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), offset)
            self.arguments[name] = copy.copy_(tensor)
        return block

    def written(self, allowed: Collection[str]) -> str | None:
        """Say what was written besides the tensors *allowed*, or return None."""
        for block, before, names in self._blocks:
            changed = block != before
            for name in allowed:
                if name in names:
                    changed &= ~_bytes_of(self.arguments[name], block)
            if changed.any():
                hit = [n for n in names if (changed & _bytes_of(self.arguments[n], block)).any()]
                where = hit[0] if hit else f"the memory around {' and '.join(names)}"
                return f"writes into {where}"
        return None

    def owners(self) -> dict[int, str]:
        """Return the address of each storage and an argument that lies there."""
        return {block.data_ptr(): f"argument {names[0]}" for block, _, names in self._blocks}


def _by_storage(arguments: Mapping[str, Any]) -> dict[Any, list[str]]:
    found: dict[Any, list[str]] = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            found.setdefault(value.untyped_storage().data_ptr() or name, []).append(name)
    return found


def _bytes_of(tensor: Tensor, block: Tensor) -> Tensor:
    """Return a mask of the bytes of *block* that *tensor* covers."""
    mask = torch.zeros_like(block)
    elements = mask.view(tensor.dtype)
    bits(elements.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())).fill_(-1)
    return mask != 0


def wider_rows(tensor: Tensor, extra: int) -> Tensor | None:
    """Return a copy with *extra* elements between its rows, off its alignment if that is odd.

    None if it is not made of rows.
    """
    inner = sum((n - 1) * s for n, s in zip(tensor.shape[1:], tensor.stride()[1:], strict=True))
    is_rows = tensor.ndim >= 2 and tensor.numel() > 0 and tensor.stride(-1) == 1
    if not is_rows or (tensor.shape[0] > 1 and tensor.stride(0) <= inner):
        return None
    pitch, start = inner + 1 + extra, extra % 2
    memory = tensor.new_empty(start + tensor.shape[0] * pitch)
    return memory.as_strided(tensor.shape, (pitch, *tensor.stride()[1:]), start).copy_(tensor)


@contextmanager
def poisoned() -> Iterator[None]:
    """Let `torch.empty` and its like return NaN, or the largest integer, in this block."""
    deterministic: Any = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        deterministic.fill_uninitialized_memory,
    )
    with warnings.catch_warnings():
        # Not the aim here: operations that are not deterministic may run.
        warnings.filterwarnings("ignore", message=".*deterministic", category=UserWarning)
        torch.use_deterministic_algorithms(mode=True, warn_only=True)
        deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            deterministic.fill_uninitialized_memory = before[2]

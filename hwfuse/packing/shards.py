"""Linears that read the same input, stacked into one weight: which rows a rank holds, and where.

A stack is described by its shards, in order.  `pack_rows` turns the tensors of a checkpoint into
the stack of one tensor parallel rank, `unpack_rows` the stacks of all ranks into a checkpoint; the
model families in this folder only say which shards there are and what a checkpoint calls them.

A tensor with several shards holds one after the other, or *interleaved*: one record for each head,
with that head's rows of every shard.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hwfuse._errors import InputError
from hwfuse.packing.fp8 import rows_per_scale

# What a projection may have; scales are told apart by their shape.
KINDS = ("weight", "bias", "weight_scale_inv", "weight_scale", "weight_offset", "input_scale")


@dataclass(frozen=True)
class Shard:
    """The rows of one projection in a stack; tensor parallelism deals out its heads whole.

    Attributes:
        name: As the model's authors call it: ``"q"``.
        num_heads: In the whole model, on all ranks together.
        head_rows: Rows of one head.
        is_shared: Whether ranks share a head where there are more ranks than heads.  A replicated
            projection is one shared head.
    """

    name: str
    num_heads: int
    head_rows: int = 1
    is_shared: bool = False

    def rows_on_rank(self, tp_size: int, *, block: int = 1) -> int:
        """Return the rows that each rank holds; `InputError` says which *tp_size* divide them.

        Args:
            tp_size: Number of tensor parallel ranks.
            block: Rows that one entry of a scale covers: 1 or 128.  No block may be cut.
        """
        if tp_size < 1:
            raise InputError("tp_size", tp_size, "at least 1")
        rows = max(self.num_heads // tp_size, 1) * self.head_rows
        is_shared = self.is_shared and tp_size % self.num_heads == 0
        if (self.num_heads % tp_size and not is_shared) or rows % block:
            raise InputError("tp_size", tp_size, self._fitting(block))
        return rows

    def source(self, tp_rank: int, tp_size: int, *, block: int = 1) -> slice:
        """Return the rows of the whole projection that one rank holds, in units of *block*."""
        rows = self.rows_on_rank(tp_size, block=block)
        if not 0 <= tp_rank < tp_size:
            raise InputError("tp_rank", tp_rank, f"0 to {tp_size - 1}")
        start = tp_rank * self.num_heads // tp_size * self.head_rows
        return slice(start // block, (start + rows) // block)

    def _fitting(self, block: int) -> str:
        unit = "" if block == 1 else f", {block} rows to one scale"
        why = f"{self.num_heads} heads of {self.head_rows} rows in {self.name}{unit}"
        sizes = [
            str(size)
            for size in range(1, self.num_heads + 1)
            if self.num_heads % size == 0 and self.num_heads // size * self.head_rows % block == 0
        ]
        if self.is_shared and self.head_rows % block == 0:
            sizes.append(f"a multiple of {self.num_heads}")
        return f"{' or '.join(sizes) or 'blocks that no size cuts'}: {why}"


# Projection in a checkpoint to the shards that its rows hold; all together are the stack.
Sources = Mapping[str, Sequence[Shard]]


class ShardRows(NamedTuple):
    """Where one shard's rows lie: in the stack of a rank, and in the whole projection."""

    destination: slice
    source: slice


def shard_rows(
    shards: Sequence[Shard], name: str, *, tp_rank: int = 0, tp_size: int = 1, block: int = 1
) -> ShardRows:
    """Return the rows of one shard on one rank, for loaders that get one tensor at a time.

    Args:
        shards: The stack, in order.
        name: Which of them.
        tp_rank: 0 to tp_size - 1.
        tp_size: Number of tensor parallel ranks.
        block: 1 for weights; 128 for block scales, whose rows the slices then count.

    Raises:
        InputError: *tp_size* does not divide a shard; the text says what does.
    """
    start = 0
    for shard in shards:
        stop = start + shard.rows_on_rank(tp_size, block=block) // block
        if shard.name == name:
            return ShardRows(slice(start, stop), shard.source(tp_rank, tp_size, block=block))
        start = stop
    raise InputError("name", repr(name), " or ".join(repr(shard.name) for shard in shards))


def pack_rows(
    checkpoint: Mapping[str, Tensor],
    sources: Sources,
    *,
    tp_rank: int = 0,
    tp_size: int = 1,
    from_interleaved: bool = False,
    to_interleaved: bool = False,
) -> dict[str, Tensor]:
    """Stack projections for one rank.

    Args:
        checkpoint: ``<projection>.<kind>`` to tensor, of the whole model.  Projections that are not
            in *sources* are left alone.
        sources: The projections in the order of the stack, each with its shards.
        tp_rank: 0 to tp_size - 1.
        tp_size: Number of tensor parallel ranks.
        from_interleaved: Whether a projection with several shards has them interleaved.
        to_interleaved: Whether the stack shall have them so.

    Returns:
        Kind to tensor, in new contiguous memory: ``weight``, and ``bias`` and scales if there are
        any.  A scale by rows or by blocks of 128 rows goes where its rows go; a scalar becomes one
        for each shard of its projection, so that the stack has ``[number of shards]``.

    Raises:
        InputError: a tensor is missing, or has another dtype than its neighbour or another shape
            than the shards; *tp_size* or a block of 128 rows does not divide them.
    """
    rows = _records(sources) if from_interleaved and to_interleaved else sources
    packed = {}
    for kind, tensors in _by_kind(checkpoint, sources).items():
        block = _common_block(kind, tensors, sources)
        if block is None:
            values = [t.reshape(1).expand(len(sources[name])) for name, t in tensors.items()]
            packed[kind] = torch.cat(values)
            continue
        parts: list[Tensor] = []
        for name, shards in rows.items():
            whole = _Rows(shards, 1, block, from_interleaved).split(tensors[name], f"{name}.{kind}")
            parts += [
                part[shard.source(tp_rank, tp_size, block=block)]
                for shard, part in zip(shards, whole, strict=True)
            ]
        packed[kind] = _Rows(_stack(rows), tp_size, block, to_interleaved).join(parts)
    return packed


def unpack_rows(
    ranks: Sequence[Mapping[str, Tensor]],
    sources: Sources,
    *,
    from_interleaved: bool = False,
    to_interleaved: bool = False,
) -> dict[str, Tensor]:
    """Undo `pack_rows`: turn the stacks of all ranks into the tensors of a checkpoint.

    Args:
        ranks: What `pack_rows` gave for each rank, in order; one for an unsharded model.
        sources: As for `pack_rows`.
        from_interleaved: Whether the stacks have their shards interleaved.
        to_interleaved: Whether a projection with several shards shall have them so.

    Returns:
        ``<projection>.<kind>`` to tensor, in new contiguous memory; a scalar has no dimensions.
        What ranks share is that of the first.

    Raises:
        InputError: ranks differ in what they have, a tensor has another shape than the shards, or
            shards that become one projection have several scalars.
    """
    tp_size = len(ranks)
    if not ranks or any(rank.keys() != ranks[0].keys() for rank in ranks):
        found = " and ".join(str(sorted(rank)) for rank in ranks) or "none"
        raise InputError("ranks", found, "at least one, all with the same tensors")
    rows = _records(sources) if from_interleaved and to_interleaved else sources
    stack = _stack(rows)
    num_rows = sum(shard.rows_on_rank(tp_size) for shard in stack)
    checkpoint: dict[str, Tensor] = {}
    for kind, first in ranks[0].items():
        if _is_scale(kind) and first.shape == (len(_stack(sources)),):
            checkpoint |= _scalars(kind, first, sources)
            continue
        block = (rows_per_scale(first, num_rows, name=kind) or 1) if _is_scale(kind) else 1
        placed = _Rows(stack, tp_size, block, from_interleaved)
        by_rank = [placed.split(rank[kind], f"{kind} of rank {i}") for i, rank in enumerate(ranks)]
        whole = iter(
            [
                torch.cat(parts[:: max(1, tp_size // shard.num_heads)])
                for shard, parts in zip(stack, zip(*by_rank, strict=True), strict=True)
            ]
        )
        for name, shards in rows.items():
            mine = [next(whole) for _ in shards]
            checkpoint[f"{name}.{kind}"] = _Rows(shards, 1, block, to_interleaved).join(mine)
    return checkpoint


@dataclass(frozen=True)
class _Rows:
    """How the rows of one tensor lie.  A tensor by rows has block 1, a block scale 128."""

    shards: Sequence[Shard]
    tp_size: int
    block: int
    is_interleaved: bool

    def split(self, tensor: Tensor, name: str) -> list[Tensor]:
        """Return the rows of each shard; views unless interleaved."""
        num_records, widths = self._records()
        if tensor.ndim == 0 or tensor.shape[0] != num_records * sum(widths):
            each = zip(self.shards, widths, strict=True)
            rows = " + ".join(f"{shard.name} {num_records * width}" for shard, width in each)
            needed = f"{num_records * sum(widths)} rows: {rows}"
            raise InputError(f"{name}.shape", tuple(tensor.shape), needed)
        records = tensor.unflatten(0, (num_records, sum(widths)))
        return [part.flatten(0, 1) for part in records.split(widths, dim=1)]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Undo `split`, in new memory."""
        num_records, widths = self._records()
        pairs = zip(parts, widths, strict=True)
        records = [part.unflatten(0, (num_records, width)) for part, width in pairs]
        return torch.cat(records, dim=1).flatten(0, 1)

    def _records(self) -> tuple[int, list[int]]:
        """Return the number of records and how much of each shard is in one, in blocks."""
        rows = [shard.rows_on_rank(self.tp_size, block=self.block) for shard in self.shards]
        is_interleaved = self.is_interleaved and len(rows) > 1
        num_records = self.shards[0].num_heads // self.tp_size if is_interleaved else 1
        for shard, count in zip(self.shards, rows, strict=True):
            if count // num_records % self.block:
                needed = f"a multiple of {self.block}, the rows of one scale, in each record"
                raise InputError(f"rows of {shard.name}", count // num_records, needed)
        return num_records, [count // num_records // self.block for count in rows]


def _stack(sources: Sources) -> list[Shard]:
    return [shard for shards in sources.values() for shard in shards]


def _records(sources: Sources) -> Sources:
    """Describe each interleaved projection as one shard: a rank holds one slice of its records."""
    return {
        name: (Shard(name, shards[0].num_heads, sum(shard.head_rows for shard in shards)),)
        for name, shards in sources.items()
    }


def _is_scale(kind: str) -> bool:
    return kind not in ("weight", "bias")


def _by_kind(checkpoint: Mapping[str, Tensor], sources: Sources) -> dict[str, dict[str, Tensor]]:
    """Return kind to projection to tensor; all projections have the same kinds and dtypes."""
    found: dict[str, dict[str, Tensor]] = {"weight": {}}
    for key, tensor in checkpoint.items():
        name, _, kind = key.rpartition(".")
        if name in sources:
            if kind not in KINDS:
                raise InputError(key, "a tensor of unknown meaning", " or ".join(KINDS))
            found.setdefault(kind, {})[name] = tensor
    for kind, tensors in found.items():
        for name in sources:
            if name not in tensors:
                others = "".join(f", as {other} has" for other in tensors)
                raise InputError(f"{name}.{kind}", "nothing", f"a tensor{others}")
            first = next(iter(tensors))
            if tensors[name].dtype != tensors[first].dtype:
                needed = f"{tensors[first].dtype}, as {first}.{kind}"
                raise InputError(f"{name}.{kind}.dtype", tensors[name].dtype, needed)
    return {kind: {name: tensors[name] for name in sources} for kind, tensors in found.items()}


def _common_block(kind: str, tensors: Mapping[str, Tensor], sources: Sources) -> int | None:
    """Return how many rows one row of these tensors covers; None for a scalar each."""
    blocks: dict[str, int | None] = dict.fromkeys(tensors, 1)
    if _is_scale(kind):
        for name, tensor in tensors.items():
            num_rows = sum(shard.rows_on_rank(1) for shard in sources[name])
            blocks[name] = rows_per_scale(tensor, num_rows, name=f"{name}.{kind}")
    first, like = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if blocks[name] != blocks[first] or (blocks[name] and tensor.shape[1:] != like.shape[1:]):
            needed = f"a shape like {first}'s {tuple(like.shape)}, but for the rows"
            raise InputError(f"{name}.{kind}.shape", tuple(tensor.shape), needed)
    return blocks[first]


def _scalars(kind: str, values: Tensor, sources: Sources) -> dict[str, Tensor]:
    """Give each projection the one scalar of its shards."""
    counts = [len(shards) for shards in sources.values()]
    found = {}
    for name, mine in zip(sources, values.split(counts), strict=True):
        if not mine.is_meta and (mine != mine[0]).any():
            needed = f"one value for all of {name}: requantise its weight to one scale first"
            raise InputError(kind, mine.tolist(), needed)
        found[f"{name}.{kind}"] = mine[0].clone()
    return found

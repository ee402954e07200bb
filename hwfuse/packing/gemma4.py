"""Gemma4's attention: which of q, k and v a layer projects decides its weight and its norm."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence

from torch import Tensor

from hwfuse._errors import InputError
from hwfuse.packing.shards import Shard, pack_rows, unpack_rows

_PACKED = "qkv_proj"


class QKVNormMode(enum.Enum):
    """What a layer projects; the value is the op that normalises it.

    ``mode.value`` is an op's name; with ``_`` after it, that of its twin in place, which Q and QKV
    have.
    """

    Q = "q_rms_norm"
    """Only q: keys and values are those of an earlier layer."""

    Q_KEQV = "q_keqv_rms_norm"
    """q and one projection that is key and, before its weight and rotation, value."""

    QKV = "qkv_rms_norm"
    """q, k and v."""

    @classmethod
    def of(cls, *, is_kv_shared: bool, is_k_eq_v: bool) -> QKVNormMode:
        """Return a layer's mode.

        Args:
            is_kv_shared: It uses the keys and values of an earlier layer.
            is_k_eq_v: It has no v_proj: the model has ``attention_k_eq_v`` and this is one of its
                layers of full attention.
        """
        if is_kv_shared:
            return cls.Q
        return cls.Q_KEQV if is_k_eq_v else cls.QKV

    def shards(self, *, num_q_heads: int, num_kv_heads: int, head_dim: int) -> tuple[Shard, ...]:
        """Return what the projection is stacked of, for `shard_rows`.

        With more ranks than key and value heads, ranks share a head.

        Args:
            num_q_heads: In the whole model.
            num_kv_heads: In the whole model.
            head_dim: D, of this layer.
        """
        q = Shard("q", num_q_heads, head_dim)
        k, v = (Shard(name, num_kv_heads, head_dim, is_shared=True) for name in "kv")
        return {self.Q: (q,), self.Q_KEQV: (q, k), self.QKV: (q, k, v)}[self]

    def projection_size(
        self, *, num_q_heads: int, num_kv_heads: int, head_dim: int, tp_size: int = 1
    ) -> int:
        """Return the rows of the packed weight on each rank; arguments as for `shards`."""
        shards = self.shards(num_q_heads=num_q_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
        return sum(shard.rows_on_rank(tp_size) for shard in shards)


def pack_gemma4(
    checkpoint: Mapping[str, Tensor],
    mode: QKVNormMode,
    *,
    head_dim: int,
    tp_rank: int = 0,
    tp_size: int = 1,
) -> dict[str, Tensor]:
    """Stack the projections that a layer has, for one tensor parallel rank.

    Args:
        checkpoint: A layer's tensors, ``q_proj.weight`` ``[Hq*D, hidden]``, and ``k_proj.weight``,
            ``v_proj.weight`` ``[Hkv*D, hidden]`` as *mode* says, any dtype; ``bias`` and scales (of
            blocks of 128 rows, of rows, or one scalar) if all of them have those.  Other modules'
            tensors, and those of q_norm and k_norm, are left alone; so are k_proj and v_proj in
            mode Q.
        mode: What the layer projects.
        head_dim: D, of this layer.
        tp_rank: 0 to tp_size - 1.
        tp_size: Number of ranks; divides Hq, and divides Hkv or is a multiple of it.

    Returns:
        ``qkv_proj.<kind>`` in new contiguous memory, rows q, k, v as the mode has them.  Scalar
        scales become one number for each.

    Raises:
        InputError: tensors are missing or do not fit each other, there is a v_proj in mode Q_KEQV,
            or *tp_size* or a block of 128 rows does not divide them.

    Source: Gemma4's ``Gemma4TextAttention``; SGLang #25461, which also shrinks the projection where
    k = v.
    """
    if mode is QKVNormMode.Q_KEQV and any(key.startswith("v_proj.") for key in checkpoint):
        raise InputError("v_proj", "a tensor", "none: in mode Q_KEQV k_proj is the value, too")
    if head_dim < 1:
        raise InputError("head_dim", head_dim, "a positive number")
    shards = mode.shards(
        num_q_heads=_num_heads(checkpoint, "q", head_dim),
        num_kv_heads=1 if mode is QKVNormMode.Q else _num_heads(checkpoint, "k", head_dim),
        head_dim=head_dim,
    )
    packed = pack_rows(checkpoint, _sources(shards), tp_rank=tp_rank, tp_size=tp_size)
    return {f"{_PACKED}.{kind}": tensor for kind, tensor in packed.items()}


def unpack_gemma4(
    ranks: Sequence[Mapping[str, Tensor]],
    mode: QKVNormMode,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> dict[str, Tensor]:
    """Undo `pack_gemma4`.

    Args:
        ranks: What `pack_gemma4` gave for each rank, in order; one for an unsharded model.
        mode: What the layer projects.
        num_q_heads: In the whole model.
        num_kv_heads: In the whole model; any number in mode Q.
        head_dim: D, of this layer.

    Returns:
        The checkpoint's tensors in new contiguous memory; a scalar scale has no dimensions.  A head
        that ranks share is that of the first of them.

    Raises:
        InputError: tensors do not fit each other or the head counts.
    """
    shards = mode.shards(num_q_heads=num_q_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
    kinds = [{key.removeprefix(f"{_PACKED}."): t for key, t in rank.items()} for rank in ranks]
    return unpack_rows(kinds, _sources(shards))


def _num_heads(checkpoint: Mapping[str, Tensor], name: str, head_dim: int) -> int:
    weight = checkpoint.get(f"{name}_proj.weight")
    if weight is None:
        raise InputError(f"{name}_proj.weight", "nothing", "a tensor")
    rows = weight.shape[0] if weight.ndim == 2 else 0
    if not rows or rows % head_dim:
        needed = f"a positive multiple of {head_dim} rows"
        raise InputError(f"{name}_proj.weight.shape", tuple(weight.shape), needed)
    return rows // head_dim


def _sources(shards: Sequence[Shard]) -> dict[str, tuple[Shard, ...]]:
    return {f"{shard.name}_proj": (shard,) for shard in shards}

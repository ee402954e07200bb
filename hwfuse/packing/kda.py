"""Kimi delta attention (Kimi Linear, GLM-5.3-Flash): the weights of the op fused_qkvbfg.

A checkpoint has eight projections: q, k, v, beta and the two low ranks f_a and g_a read the hidden
state and are stacked in this order; f_b and g_b read the low ranks and are stacked apart.  Tensor
parallelism deals out heads, and gives the whole of f_a and g_a to every rank: each head needs the
whole low rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hwfuse._errors import InputError
from hwfuse.packing.shards import Shard, pack_rows, unpack_rows

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_GATES = ("f_b", "g_b")  # in the order of w_fg
_NAMES = tuple(f"{name}_proj" for name in ("q", "k", "v", "b", "f_a", "g_a", *_GATES))
_BIASES = tuple(f"{name}_proj.bias" for name in _GATES)


def kda_shards(*, num_heads: int, head_dim: int) -> tuple[Shard, ...]:
    """Return the six shards of ``w_qkvbfg``, for `shard_rows`.

    Args:
        num_heads: H, in the whole model.
        head_dim: D, in elements; also the rank of both gates.
    """
    return (
        *(Shard(name, num_heads, head_dim) for name in ("q", "k", "v")),
        Shard("b", num_heads),
        *(Shard(name, 1, head_dim, is_shared=True) for name in ("f_a", "g_a")),
    )


def pack_kda(
    checkpoint: Mapping[str, Tensor], *, tp_rank: int = 0, tp_size: int = 1
) -> dict[str, Tensor]:
    """Make the two weights of fused_qkvbfg for one tensor parallel rank.

    Args:
        checkpoint: A layer's tensors, ``<name>.weight``, bfloat16, float16 or float32, with C
            channels, P = H*D: q_proj, k_proj, v_proj ``[P, C]``, b_proj ``[H, C]``, f_a_proj,
            g_a_proj ``[D, C]``, f_b_proj, g_b_proj ``[P, D]``.  H and D follow.  Only f_b_proj and
            g_b_proj may have a ``bias`` ``[P]``.  Other modules' tensors are left alone.
        tp_rank: 0 to tp_size - 1.
        tp_size: Number of ranks; divides H.

    Returns:
        ``w_qkvbfg`` ``[3*p + h + 2*D, C]`` and ``w_fg`` ``[2, p, D]``, with h = H / tp_size and
        p = h*D, and of each bias its part ``[p]`` under its own name: the caller adds it to that
        gate.  All in new contiguous memory.

    Raises:
        InputError: any of the eight is quantised (then they must stay apart), missing or of a shape
            or dtype that does not fit; or *tp_size* does not divide H.

    Source: Kimi Linear's checkpoint; SGLang's ``MergedColumnParallelRepeatedLinear`` and
    ``ColumnParallelBatchedLinear``; fla's layer has a bias on the output gate.
    """
    num_heads, head_dim = _check(checkpoint)
    weights = {f"{name}.weight": checkpoint[f"{name}.weight"] for name in _NAMES}
    stacks = {}
    for name, shards in _stacks(num_heads, head_dim).items():
        sources = {f"{shard.name}_proj": (shard,) for shard in shards}
        stacks[name] = pack_rows(weights, sources, tp_rank=tp_rank, tp_size=tp_size)["weight"]
    rows = Shard("bias", num_heads, head_dim).source(tp_rank, tp_size)
    biases = {key: checkpoint[key][rows].clone() for key in _BIASES if key in checkpoint}
    return {**stacks, "w_fg": stacks["w_fg"].unflatten(0, (2, -1)), **biases}


def unpack_kda(ranks: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Undo `pack_kda`.

    Args:
        ranks: What `pack_kda` gave for each rank, in order; one for an unsharded model.

    Returns:
        The checkpoint's tensors in new contiguous memory.  f_a and g_a are those of the first rank.

    Raises:
        InputError: tensors do not fit each other.
    """
    names = {"w_qkvbfg", "w_fg", *(ranks[0].keys() & _BIASES if ranks else ())}
    if not ranks or any(rank.keys() != names for rank in ranks):
        found = " and ".join(str(sorted(rank)) for rank in ranks) or "none"
        raise InputError("ranks", found, "w_qkvbfg and w_fg of each rank, and the same biases")
    num_heads, head_dim = _sizes(ranks[0]["w_fg"])
    checkpoint: dict[str, Tensor] = {}
    for name, shards in _stacks(num_heads * len(ranks), head_dim).items():
        sources = {f"{shard.name}_proj": (shard,) for shard in shards}
        stacks = [rank[name].flatten(0, -2) for rank in ranks]
        checkpoint |= unpack_rows([{"weight": stack} for stack in stacks], sources)
    biases = [key for key in _BIASES if key in names]
    return checkpoint | {key: torch.cat([rank[key] for rank in ranks]) for key in biases}


def kda_views(w_qkvbfg: Tensor, w_fg: Tensor) -> dict[str, Tensor]:
    """Return the eight weights of one rank as views of its two, under the checkpoint's names.

    With parameters that are such views a state dict keeps its names, and no weight exists twice.

    Raises:
        InputError: shapes that do not fit each other.
    """
    num_heads, head_dim = _sizes(w_fg)
    rows = [s.rows_on_rank(1) for s in kda_shards(num_heads=num_heads, head_dim=head_dim)]
    if w_qkvbfg.ndim != 2 or w_qkvbfg.shape[0] != sum(rows):
        raise InputError("w_qkvbfg.shape", tuple(w_qkvbfg.shape), f"[{sum(rows)}, hidden]")
    views = (*w_qkvbfg.split(rows), *w_fg)
    return {f"{name}.weight": view for name, view in zip(_NAMES, views, strict=True)}


def split_qkvbfg(qkvbfg: Tensor, *, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Slice fused_qkvbfg's first result; all three are views.

    Args:
        qkvbfg: ``[..., 3*p + h + 2*D]`` with p = h*D.
        head_dim: D, in elements.

    Returns:
        mixed_qkv: ``[..., 3*p]``: all q, all k, all v.
        b: ``[..., h]``, logits of beta, before the sigmoid.
        fg: ``[..., 2*D]``, the low ranks of the forget and of the output gate.

    Raises:
        InputError: a width that gives no whole number of heads.
    """
    if head_dim < 1:
        raise InputError("head_dim", head_dim, "a positive number")
    width = qkvbfg.shape[-1]
    num_heads = (width - 2 * head_dim) // (3 * head_dim + 1)
    if num_heads < 1 or width != num_heads * (3 * head_dim + 1) + 2 * head_dim:
        needed = f"num_heads * {3 * head_dim + 1} + {2 * head_dim}, with whole heads"
        raise InputError("qkvbfg.shape[-1]", width, needed)
    mixed_qkv, b, fg = qkvbfg.split([3 * num_heads * head_dim, num_heads, 2 * head_dim], dim=-1)
    return mixed_qkv, b, fg


def _stacks(num_heads: int, head_dim: int) -> dict[str, tuple[Shard, ...]]:
    return {
        "w_qkvbfg": kda_shards(num_heads=num_heads, head_dim=head_dim),
        "w_fg": tuple(Shard(name, num_heads, head_dim) for name in _GATES),
    }


def _sizes(w_fg: Tensor) -> tuple[int, int]:
    """Return the head count and head width of one rank's second weight."""
    if w_fg.ndim != 3 or w_fg.shape[0] != 2 or w_fg.shape[1] % max(w_fg.shape[2], 1):
        raise InputError("w_fg.shape", tuple(w_fg.shape), "[2, num_heads * head_dim, head_dim]")
    return w_fg.shape[1] // w_fg.shape[2], w_fg.shape[2]


def _check(checkpoint: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return head count and head width; refuse what does not fit the op."""
    for name in _NAMES:
        if f"{name}.weight" not in checkpoint:
            raise InputError(f"{name}.weight", "nothing", "a tensor")
    for key, tensor in checkpoint.items():
        name, _, kind = key.rpartition(".")
        if name in _NAMES:
            _check_plain(key, kind, tensor)
    q, b, f_a = (checkpoint[f"{name}_proj.weight"] for name in ("q", "b", "f_a"))
    num_heads, head_dim = b.shape[0], f_a.shape[0]
    for name in _GATES:
        gate, shape = checkpoint[f"{name}_proj.weight"], (num_heads * head_dim, head_dim)
        if gate.shape != shape or gate.dtype != q.dtype:
            found = f"{gate.dtype} {tuple(gate.shape)}"
            raise InputError(f"{name}_proj.weight", found, f"{q.dtype} {shape}, as the others give")
    for key in _BIASES:
        if key in checkpoint and checkpoint[key].shape != (num_heads * head_dim,):
            needed = f"({num_heads * head_dim},)"
            raise InputError(f"{key}.shape", tuple(checkpoint[key].shape), needed)
    return num_heads, head_dim


def _check_plain(key: str, kind: str, tensor: Tensor) -> None:
    if kind not in ("weight", "bias") or tensor.dtype not in _FLOATS:
        needed = "bfloat16, float16 or float32: eight projections of which one is quantised "
        raise InputError(key, tensor.dtype, needed + "stay apart")
    if kind == "bias" and key not in _BIASES:
        raise InputError(key, "a bias", f"none: only {' and '.join(_BIASES)} can be added later")

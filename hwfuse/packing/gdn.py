"""Gated delta nets (Qwen3-Next, Qwen3.5): the weights in front of the op fused_qkvzba.

Two kinds of checkpoints hold the same six projections of Hk key and Hv value heads:

* fused (Qwen3-Next): ``in_proj_qkvz`` and ``in_proj_ba``, interleaved: for each key head its rows
  of q, k, v and z, or of b and a;
* split (Qwen3.5): ``in_proj_qkv`` (all q, all k, all v), ``in_proj_z``, ``in_proj_b`` and
  ``in_proj_a``.

`pack_gdn` turns either into the two parameters ``in_proj_qkvz`` and ``in_proj_ba``, in the layout
that the op is then called with, and `unpack_gdn` turns those into either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from hwfuse._errors import InputError
from hwfuse.packing.shards import Shard, pack_rows, unpack_rows

# Packed parameter to its shards, one letter each; likewise for the projections of a checkpoint.
_PACKED = {"in_proj_qkvz": "qkvz", "in_proj_ba": "ba"}
_FORMS = {
    "fused": _PACKED,
    "split": {"in_proj_qkv": "qkv", "in_proj_z": "z", "in_proj_b": "b", "in_proj_a": "a"},
}
_LAYOUTS = ("interleaved", "contiguous")


def gdn_shards(
    *, num_k_heads: int, num_v_heads: int, head_k_dim: int, head_v_dim: int
) -> dict[str, tuple[Shard, ...]]:
    """Return the shards of ``in_proj_qkvz`` and ``in_proj_ba``, for `shard_rows`.

    A head of a shard is a key head with the value heads that go with it.

    Args:
        num_k_heads: Hk, in the whole model.
        num_v_heads: Hv, a multiple of Hk.
        head_k_dim: Dk, in elements.
        head_v_dim: Dv, in elements.
    """
    if num_k_heads < 1 or num_v_heads < 1 or num_v_heads % num_k_heads:
        needed = f"a positive multiple of num_k_heads = {num_k_heads}"
        raise InputError("num_v_heads", num_v_heads, needed)
    r = num_v_heads // num_k_heads
    rows = {"q": head_k_dim, "k": head_k_dim, "v": r * head_v_dim, "z": r * head_v_dim}
    rows |= {"b": r, "a": r}
    return {
        name: tuple(Shard(letter, num_k_heads, rows[letter]) for letter in letters)
        for name, letters in _PACKED.items()
    }


def pack_gdn(
    checkpoint: Mapping[str, Tensor],
    *,
    head_k_dim: int,
    head_v_dim: int,
    layout: str,
    tp_rank: int = 0,
    tp_size: int = 1,
) -> dict[str, Tensor]:
    """Make the two input projections of one gated delta net, for one tensor parallel rank.

    Args:
        checkpoint: A layer's tensors, ``in_proj_qkvz.weight`` and so on, fused or split.  Besides
            ``weight`` ``[rows, hidden]``, any dtype, and ``bias`` ``[rows]`` the projections of q,
            k, v and z may have scales: of blocks of 128 rows, of rows, or one scalar.  Head counts
            follow from the shapes.  Other modules' tensors are left alone.
        head_k_dim: Dk, in elements.
        head_v_dim: Dv, in elements.
        layout: ``"interleaved"`` or ``"contiguous"``: the order of the rows, as fused_qkvzba's.
        tp_rank: 0 to tp_size - 1.
        tp_size: Number of ranks; divides Hk.

    Returns:
        ``in_proj_qkvz.<kind>`` and ``in_proj_ba.<kind>`` in new contiguous memory.  A scalar scale
        becomes four, of q, k, v and z.

    Raises:
        InputError: tensors are missing or do not fit each other, *tp_size* or a block of 128 rows
            does not divide them, or b or a is quantised: their few rows share no scale with others.

    Source: Qwen3-Next's and Qwen3.5's checkpoints; SGLang's loaders of both.
    """
    form = _form(checkpoint)
    _check_layout(layout)
    _check_unquantised(checkpoint, form)
    shards = _shards(checkpoint, _FORMS[form], head_k_dim, head_v_dim, 1)
    packed: dict[str, Tensor] = {}
    for name, letters in _PACKED.items():
        parts = pack_rows(
            checkpoint,
            _sources(_FORMS[form], letters, shards),
            tp_rank=tp_rank,
            tp_size=tp_size,
            from_interleaved=form == "fused",
            to_interleaved=layout == "interleaved",
        )
        packed |= {f"{name}.{kind}": tensor for kind, tensor in parts.items()}
    return packed


def unpack_gdn(
    ranks: Sequence[Mapping[str, Tensor]],
    *,
    head_k_dim: int,
    head_v_dim: int,
    layout: str,
    form: str,
) -> dict[str, Tensor]:
    """Undo `pack_gdn`, into a checkpoint of either form.

    Args:
        ranks: What `pack_gdn` gave for each rank, in order; one for an unsharded model.
        head_k_dim: Dk, in elements.
        head_v_dim: Dv, in elements.
        layout: That of *ranks*.
        form: ``"fused"`` or ``"split"``.

    Returns:
        The checkpoint's tensors in new contiguous memory; a scalar scale has no dimensions.

    Raises:
        InputError: tensors do not fit each other, or shards that become one projection have
            several scalar scales.
    """
    _check_layout(layout)
    if form not in _FORMS:
        raise InputError("form", repr(form), " or ".join(map(repr, _FORMS)))
    if not ranks:
        raise InputError("ranks", "none", "at least one")
    shards = _shards(ranks[0], _PACKED, head_k_dim, head_v_dim, len(ranks))
    unpacked: dict[str, Tensor] = {}
    for name, letters in _PACKED.items():
        unpacked |= unpack_rows(
            [_of(name, rank) for rank in ranks],
            _sources(_FORMS[form], letters, shards),
            from_interleaved=layout == "interleaved",
            to_interleaved=form == "fused",
        )
    return unpacked


def split_qkvzba(
    qkvz: Tensor, ba: Tensor, *, head_k_dim: int, head_v_dim: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return fused_qkvzba's four results for the contiguous layout as views: nothing is copied.

    For consumers that take strides; the op itself makes dense rows.

    Args:
        qkvz: ``[..., 2*Hk*Dk + 2*Hv*Dv]``, contiguous layout, any dtype and strides.
        ba: ``[..., 2*Hv]``.
        head_k_dim: Dk, in elements.
        head_v_dim: Dv, in elements.

    Returns:
        mixed_qkv: ``[..., 2*Hk*Dk + Hv*Dv]``, the first columns of *qkvz*.
        z: ``[..., Hv, Dv]``, its last columns.
        b: ``[..., Hv]``, the first columns of *ba*.
        a: ``[..., Hv]``, its last columns.

    Raises:
        InputError: widths that give no whole number of heads.
    """
    _, num_v_heads = _num_heads(qkvz.shape[-1], ba.shape[-1], head_k_dim, head_v_dim, "columns of ")
    z_width = num_v_heads * head_v_dim
    mixed_qkv, z = qkvz.split([qkvz.shape[-1] - z_width, z_width], dim=-1)
    b, a = ba.split(num_v_heads, dim=-1)
    return mixed_qkv, z.unflatten(-1, (num_v_heads, head_v_dim)), b, a


def _form(checkpoint: Mapping[str, Tensor]) -> str:
    present = {key.rpartition(".")[0] for key in checkpoint}
    forms = [form for form, names in _FORMS.items() if present & names.keys()]
    if len(forms) != 1:
        found = " and ".join(sorted(present)) or "nothing"
        needed = " or else ".join(" and ".join(names) for names in _FORMS.values())
        raise InputError("checkpoint", found, needed)
    return forms[0]


def _check_layout(layout: str) -> None:
    if layout not in _LAYOUTS:
        raise InputError("layout", repr(layout), " or ".join(map(repr, _LAYOUTS)))


def _check_unquantised(checkpoint: Mapping[str, Tensor], form: str) -> None:
    of_b_and_a = [name for name, letters in _FORMS[form].items() if letters in "ba"]
    for key in checkpoint:
        name, _, kind = key.rpartition(".")
        if name in of_b_and_a and kind not in ("weight", "bias"):
            raise InputError(key, "a scale", "none: b and a stay unquantised")


def _sources(
    names: Mapping[str, str], letters: str, shards: Mapping[str, Shard]
) -> dict[str, list[Shard]]:
    """Return the projections that one packed parameter is made of, with their shards."""
    return {
        name: [shards[letter] for letter in mine] for name, mine in names.items() if mine in letters
    }


def _of(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return kind to tensor of one projection."""
    start = f"{name}."
    return {
        key.removeprefix(start): tensor for key, tensor in tensors.items() if key.startswith(start)
    }


def _shards(
    tensors: Mapping[str, Tensor],
    names: Mapping[str, str],
    head_k_dim: int,
    head_v_dim: int,
    tp_size: int,
) -> dict[str, Shard]:
    """Return all shards by letter, with the head counts that the weights have on all ranks."""
    rows = dict.fromkeys(_PACKED.values(), 0)
    for name, mine in names.items():
        weight = tensors.get(f"{name}.weight")
        if weight is None or weight.ndim != 2:
            found = "nothing" if weight is None else f"{tuple(weight.shape)}"
            raise InputError(f"{name}.weight", found, "a tensor [rows, hidden]")
        rows["ba" if mine in "ba" else "qkvz"] += weight.shape[0]
    num_k_heads, num_v_heads = _num_heads(
        rows["qkvz"], rows["ba"], head_k_dim, head_v_dim, "rows of in_proj_"
    )
    shards = gdn_shards(
        num_k_heads=num_k_heads * tp_size,
        num_v_heads=num_v_heads * tp_size,
        head_k_dim=head_k_dim,
        head_v_dim=head_v_dim,
    )
    return {shard.name: shard for stack in shards.values() for shard in stack}


def _num_heads(qkvz: int, ba: int, head_k_dim: int, head_v_dim: int, what: str) -> tuple[int, int]:
    """Solve ``qkvz = 2*Hk*Dk + 2*Hv*Dv`` and ``ba = 2*Hv``."""
    for name, value in (("head_k_dim", head_k_dim), ("head_v_dim", head_v_dim)):
        if value < 1:
            raise InputError(name, value, "a positive number")
    num_v_heads = ba // 2
    if ba % 2 or not num_v_heads:
        raise InputError(f"{what}ba", ba, "2 * num_v_heads, even and positive")
    key_rows = qkvz - 2 * num_v_heads * head_v_dim
    num_k_heads = key_rows // (2 * head_k_dim)
    if key_rows % (2 * head_k_dim) or num_k_heads < 1:
        needed = (
            f"2 * num_k_heads * {head_k_dim} + {2 * num_v_heads * head_v_dim}"
            f" (ba gives num_v_heads = {num_v_heads})"
        )
        raise InputError(f"{what}qkvz", qkvz, needed)
    if num_v_heads % num_k_heads:
        needed = f"a multiple of num_k_heads = {num_k_heads}, which qkvz gives"
        raise InputError("num_v_heads", num_v_heads, needed)
    return num_k_heads, num_v_heads

"""GDN weights: either checkpoint into either layout, on any number of ranks, and back."""

import pytest
import torch

from hwfuse import InputError
from hwfuse.packing import gdn_shards, pack_gdn, shard_rows, split_qkvzba, unpack_gdn
from hwfuse_reference.torch_ops.fused_qkvzba import fused_qkvzba

LAYOUTS = ("interleaved", "contiguous")
FORMS = ("fused", "split")
SIZES = [(16, 16, 4, 4), (16, 48, 2, 3), (8, 32, 3, 2), (8, 8, 1, 5)]  # Hk, Hv, Dk, Dv
BLOCKS = (8, 16, 128, 128)
WIDTHS = {"qkv": "in_proj_qkv", "z": "in_proj_z", "b": "in_proj_b", "a": "in_proj_a"}


def numbers(*shape):
    """Return whole numbers, all different."""
    return torch.arange(torch.tensor(shape).prod()).view(shape).float()


def split_checkpoint(hk, hv, dk, dv, hidden=2, kind="weight", block=1):
    """Return a checkpoint as Qwen3.5's, of distinct numbers; with *block* its block scales."""
    rows = {"qkv": 2 * hk * dk + hv * dv, "z": hv * dv, "b": hv, "a": hv}
    if block > 1:
        rows = {name: n // block for name, n in rows.items() if name in ("qkv", "z")}
    parts = numbers(sum(rows.values()), hidden).split(list(rows.values()))
    return {f"{WIDTHS[n]}.{kind}": part for n, part in zip(rows, parts, strict=True)}


def interleaved_order(hk, hv, dk, dv):
    """Return which of the rows all q, all k, all v, all z each interleaved row is."""
    r, order = hv // hk, []
    for g in range(hk):
        order += [g * dk + d for d in range(dk)]
        order += [hk * dk + g * dk + d for d in range(dk)]
        order += [2 * hk * dk + (g * r + j) * dv + d for j in range(r) for d in range(dv)]
        order += [2 * hk * dk + (hv + g * r + j) * dv + d for j in range(r) for d in range(dv)]
    return order


def fused_checkpoint(hk, hv, dk, dv):
    """Return the same model's checkpoint as Qwen3-Next's, row by row."""
    split, r = split_checkpoint(hk, hv, dk, dv), hv // hk
    qkvz = torch.cat([split["in_proj_qkv.weight"], split["in_proj_z.weight"]])
    ba = torch.cat([split["in_proj_b.weight"], split["in_proj_a.weight"]])
    order = [half * hv + g * r + j for g in range(hk) for half in (0, 1) for j in range(r)]
    return {
        "in_proj_qkvz.weight": qkvz[interleaved_order(hk, hv, dk, dv)],
        "in_proj_ba.weight": ba[order],
    }


def checkpoint_of(form, *sizes):
    """Return one model's checkpoint in one form."""
    return fused_checkpoint(*sizes) if form == "fused" else split_checkpoint(*sizes)


def pack_all(checkpoint, sizes, layout, tp_size):
    """Pack for every rank."""
    dims = {"head_k_dim": sizes[2], "head_v_dim": sizes[3], "layout": layout}
    return [pack_gdn(checkpoint, **dims, tp_rank=t, tp_size=tp_size) for t in range(tp_size)]


def unpack_all(ranks, sizes, layout, form):
    """Unpack the ranks."""
    return unpack_gdn(ranks, head_k_dim=sizes[2], head_v_dim=sizes[3], layout=layout, form=form)


def assert_same(found, expected):
    """Assert equal names, shapes and bits."""
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        assert found[key].shape == tensor.shape
        assert found[key].is_contiguous()
        bits = (t.reshape(-1).view(torch.uint8) for t in (found[key], tensor))
        assert torch.equal(*bits)


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", SIZES)
def test_either_checkpoint_packs_to_the_same_ranks_and_unpacks_to_either(sizes, layout, tp_size):
    """Two forms, two layouts and every number of ranks describe the one model."""
    forms = {form: checkpoint_of(form, *sizes) for form in FORMS}
    ranks, others = (pack_all(forms[form], sizes, layout, tp_size) for form in FORMS)
    for rank, other in zip(ranks, others, strict=True):
        assert_same(rank, other)
    for form, checkpoint in forms.items():
        assert_same(unpack_all(ranks, sizes, layout, form), checkpoint)


@pytest.mark.parametrize("form", FORMS)
def test_whole_model_in_a_form_s_own_layout_keeps_every_row_in_place(form):
    """Interleaved is the fused checkpoint itself, contiguous the split one, concatenated."""
    sizes = SIZES[1]
    split, fused = split_checkpoint(*sizes), fused_checkpoint(*sizes)
    interleaved, contiguous = (
        pack_all(checkpoint_of(form, *sizes), sizes, layout, 1)[0] for layout in LAYOUTS
    )
    assert_same(interleaved, fused)
    qkvz = torch.cat([split["in_proj_qkv.weight"], split["in_proj_z.weight"]])
    ba = torch.cat([split["in_proj_b.weight"], split["in_proj_a.weight"]])
    assert_same(contiguous, {"in_proj_qkvz.weight": qkvz, "in_proj_ba.weight": ba})


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_op_gives_each_rank_its_heads_of_the_unsharded_result(form, layout, tp_size):
    """Packing and the op's layout word mean the same; weights are whole numbers, sums exact."""
    sizes = hk, hv, dk, dv = SIZES[1]
    x = torch.tensor([[1.0, 2.0], [0.0, -1.0], [3.0, 1.0]])
    checkpoint = split_checkpoint(*sizes)
    q, k, v = (x @ checkpoint["in_proj_qkv.weight"].t()).split([hk * dk, hk * dk, hv * dv], dim=1)
    z, b, a = (x @ checkpoint[f"in_proj_{name}.weight"].t() for name in "zba")
    ranks = pack_all(checkpoint_of(form, *sizes), sizes, layout, tp_size)
    for t, rank in enumerate(ranks):
        qkvz, ba = (x @ rank[f"in_proj_{name}.weight"].t() for name in ("qkvz", "ba"))
        found = fused_qkvzba(qkvz, ba, head_k_dim=dk, head_v_dim=dv, layout=layout)
        mine = [part.chunk(tp_size, dim=1)[t] for part in (q, k, v, z, b, a)]
        for result, expected in zip(found, (torch.cat(mine[:3], dim=1), *mine[3:]), strict=True):
            assert torch.equal(result.flatten(1), expected)


@pytest.mark.parametrize("tp_size", [2, 4])
def test_rank_of_a_fused_checkpoint_is_one_contiguous_slice(tp_size):
    """Group records stay whole.  The same slice of the contiguous weight mixes q, k, v and z."""
    sizes = SIZES[1]
    fused, ranks = fused_checkpoint(*sizes), []
    for layout in LAYOUTS:
        ranks.append(pack_all(fused, sizes, layout, tp_size))
        for name, whole in pack_all(fused, sizes, layout, 1)[0].items():
            slices = whole.chunk(tp_size)
            is_slice = [torch.equal(r[name], s) for r, s in zip(ranks[-1], slices, strict=True)]
            assert all(is_slice) == (layout == "interleaved")
            assert any(is_slice) == (layout == "interleaved")


@pytest.mark.parametrize("tp_size", [1, 2, 8])
def test_rows_of_each_shard_lie_where_shard_rows_says(tp_size):
    """Destination [sum(size[:i])/tp, +size[i]/tp), source [rank*size[i]/tp, +size[i]/tp)."""
    sizes = hk, hv, dk, dv = SIZES[1]
    split = split_checkpoint(*sizes)
    q, k, v = split["in_proj_qkv.weight"].split([hk * dk, hk * dk, hv * dv])
    whole = {"q": q, "k": k, "v": v} | {n: split[f"in_proj_{n}.weight"] for n in "zba"}
    shards = gdn_shards(num_k_heads=hk, num_v_heads=hv, head_k_dim=dk, head_v_dim=dv)
    for t, rank in enumerate(pack_all(split, sizes, "contiguous", tp_size)):
        for name, stack in shards.items():
            start = 0
            for shard in stack:
                n = len(whole[shard.name]) // tp_size
                rows = shard_rows(stack, shard.name, tp_rank=t, tp_size=tp_size)
                assert rows == (slice(start, start + n), slice(t * n, t * n + n))
                here, there = rank[f"{name}.weight"][rows[0]], whole[shard.name][rows[1]]
                assert torch.equal(here, there)
                start += n


def block_checkpoint(form):
    """Return distinct block scales, and a weight whose every row is its scale."""
    scale = split_checkpoint(*BLOCKS, hidden=3, kind="weight_scale_inv", block=128)
    ba = torch.zeros(16, 3)
    rows = {k.replace("_scale_inv", ""): s.repeat_interleave(128, dim=0) for k, s in scale.items()}
    rows |= {"in_proj_b.weight": ba, "in_proj_a.weight": ba}
    if form == "split":
        return rows | scale
    fused = unpack_all(pack_all(rows, BLOCKS, "contiguous", 1), BLOCKS, "contiguous", "fused")
    return fused | {"in_proj_qkvz.weight_scale_inv": fused["in_proj_qkvz.weight"][::128].clone()}


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_block_scales_move_with_their_128_rows(form, layout, tp_size):
    """Every row finds its own scale after packing, and the checkpoint's scales come back."""
    checkpoint = block_checkpoint(form)
    ranks = pack_all(checkpoint, BLOCKS, layout, tp_size)
    for rank in ranks:
        scale, weight = rank["in_proj_qkvz.weight_scale_inv"], rank["in_proj_qkvz.weight"]
        assert scale.shape == (len(weight) // 128, 3)
        assert torch.equal(scale.repeat_interleave(128, dim=0), weight)
    assert_same(unpack_all(ranks, BLOCKS, layout, form), checkpoint)


def test_block_scale_that_spans_q_and_k_stays_in_a_slice_of_records_and_nowhere_else():
    """Heads of 64 leave blocks across shards: they cannot be reordered, but whole records can."""
    sizes = (4, 4, 64, 64)
    checkpoint = fused_checkpoint(*sizes)
    checkpoint["in_proj_qkvz.weight_scale_inv"] = numbers(8, 1)
    ranks = pack_all(checkpoint, sizes, "interleaved", 2)
    assert torch.equal(ranks[1]["in_proj_qkvz.weight_scale_inv"], numbers(8, 1)[4:])
    assert_same(unpack_all(ranks, sizes, "interleaved", "fused"), checkpoint)
    with pytest.raises(InputError, match="rows of q: found 64, needed a multiple of 128"):
        pack_all(checkpoint, sizes, "contiguous", 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scalar_scale_is_repeated_for_every_shard_of_its_projection(layout):
    """The scalar of in_proj_qkv is that of q, of k and of v; only q's was filled once upstream."""
    sizes = SIZES[1]
    checkpoint = split_checkpoint(*sizes)
    for kind, shape in (("weight_scale", ()), ("input_scale", (1,))):
        checkpoint[f"in_proj_qkv.{kind}"] = torch.full(shape, 3.0)
        checkpoint[f"in_proj_z.{kind}"] = torch.full(shape, 5.0)
    ranks = pack_all(checkpoint, sizes, layout, 2)
    for rank in ranks:
        for kind in ("weight_scale", "input_scale"):
            assert rank[f"in_proj_qkvz.{kind}"].tolist() == [3.0, 3.0, 3.0, 5.0]
    back = unpack_all(ranks, sizes, layout, "split")
    assert back["in_proj_qkv.weight_scale"].item() == 3.0
    assert back["in_proj_z.input_scale"].item() == 5.0
    with pytest.raises(InputError, match=r"weight_scale: found \[3.0, 3.0, 3.0, 5.0\], needed one"):
        unpack_all(ranks, sizes, layout, "fused")


def test_one_scalar_of_a_fused_checkpoint_becomes_four_and_one_again():
    """All four shards have the projection's one scale."""
    sizes = SIZES[0]
    checkpoint = fused_checkpoint(*sizes) | {"in_proj_qkvz.weight_scale": torch.tensor(0.5)}
    for layout in LAYOUTS:
        ranks = pack_all(checkpoint, sizes, layout, 4)
        assert ranks[3]["in_proj_qkvz.weight_scale"].tolist() == [0.5] * 4
        back = unpack_all(ranks, sizes, layout, "fused")
        assert_same(back, checkpoint)
        scales = [t["in_proj_qkvz.weight_scale"] for t in (checkpoint, ranks[0], back)]
        assert len({t.untyped_storage().data_ptr() for t in scales}) == 3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bias_and_scale_by_rows_move_with_their_rows(layout):
    """Vectors of rows go where the rows of the weight go."""
    sizes = SIZES[2]
    checkpoint = split_checkpoint(*sizes, hidden=1)
    checkpoint |= {k.replace("weight", "bias"): t.squeeze(1) for k, t in checkpoint.items()}
    for name in ("in_proj_qkv", "in_proj_z"):
        checkpoint[f"{name}.weight_scale"] = checkpoint[f"{name}.weight"].clone()
    ranks = pack_all(checkpoint, sizes, layout, 2)
    for rank in ranks:
        for name in ("in_proj_qkvz", "in_proj_ba"):
            assert torch.equal(rank[f"{name}.weight"].squeeze(1), rank[f"{name}.bias"])
        assert torch.equal(rank["in_proj_qkvz.weight"], rank["in_proj_qkvz.weight_scale"])
    assert_same(unpack_all(ranks, sizes, layout, "split"), checkpoint)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_fp8_weight_beside_bfloat16_b_and_a_keeps_every_bit(form, layout):
    """The official FP8 checkpoints quantise q, k, v and z only; every byte pattern arrives."""
    sizes = SIZES[1]
    plain = checkpoint_of(form, *sizes)
    checkpoint = {
        key: t.bfloat16()
        if key[-8] in "ab"
        else (t % 256).to(torch.uint8).view(torch.float8_e4m3fn)
        for key, t in plain.items()
    }
    ranks = pack_all(checkpoint, sizes, layout, 2)
    assert ranks[0]["in_proj_qkvz.weight"].dtype == torch.float8_e4m3fn
    assert ranks[0]["in_proj_ba.weight"].dtype == torch.bfloat16
    assert_same(unpack_all(ranks, sizes, layout, form), checkpoint)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_meta_tensors_give_the_same_shapes(form, layout):
    """A model may be planned without memory."""
    for sizes in (SIZES[1], BLOCKS):
        checkpoint = checkpoint_of(form, *sizes) if sizes != BLOCKS else block_checkpoint(form)
        for name in ("in_proj_qkvz",) if form == "fused" else ("in_proj_qkv", "in_proj_z"):
            checkpoint[f"{name}.input_scale"] = torch.ones(1)
        meta = {key: t.to("meta") for key, t in checkpoint.items()}
        ranks, like = (pack_all(c, sizes, layout, 2) for c in (meta, checkpoint))
        assert [{k: t.shape for k, t in r.items()} for r in ranks] == [
            {k: t.shape for k, t in r.items()} for r in like
        ]
        back = unpack_all(ranks, sizes, layout, form)
        assert all(t.is_meta for t in back.values())
        assert back.keys() == checkpoint.keys()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_result_is_new_memory_also_where_nothing_moves(layout):
    """A parameter must not keep the checkpoint's memory alive, nor change with it."""
    sizes = SIZES[0]
    for form in FORMS:
        checkpoint = checkpoint_of(form, *sizes)
        packed = pack_all(checkpoint, sizes, layout, 1)
        back = unpack_all(packed, sizes, layout, form)
        tensors = [*checkpoint.values(), *packed[0].values(), *back.values()]
        if form == "split":
            tensors = tensors[3:]  # this checkpoint is itself one storage
        assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)


@pytest.mark.parametrize("lead", [(5,), (2, 3)])
def test_views_are_the_op_s_contiguous_results_without_a_copy(lead):
    """For consumers that take strides; rows may be slices of one merged projection."""
    hk, hv, dk, dv = 2, 6, 4, 8
    width = 2 * hk * dk + 2 * hv * dv
    merged = torch.randn(*lead, width + 2 * hv + 8)
    qkvz, ba = merged[..., :width], merged[..., width : width + 2 * hv]
    views = split_qkvzba(qkvz, ba, head_k_dim=dk, head_v_dim=dv)
    rows = (t.reshape(-1, t.shape[-1]) for t in (qkvz, ba))
    expected = fused_qkvzba(*rows, head_k_dim=dk, head_v_dim=dv, layout="contiguous")
    for view, result in zip(views, expected, strict=True):
        assert torch.equal(view.flatten(0, len(lead) - 1), result)
        assert view.untyped_storage().data_ptr() == merged.untyped_storage().data_ptr()
    assert views[1].stride()[-3:] == (width + 2 * hv + 8, dv, 1)


def good():
    """Return a checkpoint of two key and six value heads of 4."""
    return split_checkpoint(2, 6, 4, 4)


QKV, Z, A = (f"in_proj_{name}.weight" for name in ("qkv", "z", "a"))
BAD = {
    "tp_size": ({}, {"tp_size": 3}, "tp_size: found 3, needed 1 or 2: 2 heads of 4 rows in q"),
    "no ranks": ({}, {"tp_size": 0}, "tp_size: found 0, needed at least 1"),
    "tp_rank": ({}, {"tp_rank": 2, "tp_size": 2}, "tp_rank: found 2, needed 0 to 1"),
    "layout": ({}, {"layout": "split"}, "layout: found 'split', needed 'interleaved' or"),
    "head_v_dim": ({}, {"head_v_dim": 0}, "head_v_dim: found 0, needed a positive number"),
    "missing": ({Z: None}, {}, f"{Z}: found nothing, needed a tensor"),
    "both forms": (
        {"in_proj_ba.weight": numbers(12, 2)},
        {},
        "checkpoint: found in_proj_a and in_proj_b and in_proj_ba and .*needed in_proj_qkvz and",
    ),
    "rows": (
        {QKV: numbers(41, 2)},
        {},
        r"in_proj_qkvz: found 65, needed 2 \* num_k_heads \* 4 \+ 48 \(ba gives num_v_heads = 6\)",
    ),
    "rows of z": (
        {QKV: numbers(32, 2), Z: numbers(32, 2)},
        {},
        r"in_proj_qkv.weight.shape: found \(32, 2\), needed 40 rows: q 8 \+ k 8 \+ v 24",
    ),
    "a": ({A: numbers(5, 2)}, {}, "rows of in_proj_ba: found 11, needed 2 .*, even and positive"),
    "a and b": (
        {A: numbers(5, 2), "in_proj_b.weight": numbers(7, 2)},
        {},
        r"in_proj_b.weight.shape: found \(7, 2\), needed 6 rows: b 6",
    ),
    "ratio": ({QKV: numbers(56, 2)}, {}, "num_v_heads: found 6, needed a multiple .* = 4"),
    "hidden": ({Z: numbers(24, 3)}, {}, r"in_proj_z.weight.shape: found \(24, 3\), .*\(40, 2\)"),
    "rank": ({Z: numbers(24)}, {}, r"in_proj_z.weight: found \(24,\), needed a tensor \[rows,"),
    "dtype": ({Z: numbers(24, 2).half()}, {}, "in_proj_z.weight.dtype: found .*16, needed .*32"),
    "half quantised": (
        {"in_proj_qkv.weight_scale": torch.ones(1)},
        {},
        "in_proj_z.weight_scale: found nothing, needed a tensor, as in_proj_qkv has",
    ),
    "mixed scales": (
        {"in_proj_qkv.weight_scale": torch.ones(1), "in_proj_z.weight_scale": torch.ones(24)},
        {},
        r"in_proj_z.weight_scale.shape: found \(24,\), needed a shape like in_proj_qkv's \(1,\)",
    ),
    "scale of b": (
        {"in_proj_b.weight_scale_inv": torch.ones(1, 1)},
        {},
        "in_proj_b.weight_scale_inv: found a scale, needed none: b and a stay unquantised",
    ),
    "scale shape": (
        {"in_proj_qkv.weight_scale": torch.ones(3, 1), "in_proj_z.weight_scale": torch.ones(1, 1)},
        {},
        r"in_proj_qkv.weight_scale.shape: found \(3, 1\), needed .* \[1, ...\] for blocks of",
    ),
    "kind": ({"in_proj_z.qweight": A}, {}, "in_proj_z.qweight: found a tensor of unknown meaning"),
}


@pytest.mark.parametrize(("change", "options", "message"), BAD.values(), ids=BAD)
def test_bad_checkpoint_is_refused_with_what_was_found_and_needed(change, options, message):
    """An error at load time, never a plausible wrong weight."""
    checkpoint = {k: t for k, t in (good() | change).items() if t is not None}
    options = {"head_k_dim": 4, "head_v_dim": 4, "layout": "contiguous"} | options
    with pytest.raises(InputError, match=message):
        pack_gdn(checkpoint, **options)


def test_shard_whose_rank_would_cut_a_block_is_refused_with_the_sizes_that_fit():
    """Of 4 heads of 64 rows two make a block: two ranks, not four."""
    checkpoint = split_checkpoint(4, 4, 64, 64)
    for name, rows in (("in_proj_qkv", 6), ("in_proj_z", 2)):
        checkpoint[f"{name}.weight_scale_inv"] = numbers(rows, 1)
    ranks = pack_all(checkpoint, (4, 4, 64, 64), "contiguous", 2)
    assert ranks[1]["in_proj_qkvz.weight_scale_inv"].flatten().tolist() == [1, 3, 5, 1]
    message = "tp_size: found 4, needed 1 or 2: 4 heads of 64 rows in q, 128 rows to one scale"
    with pytest.raises(InputError, match=message):
        pack_all(checkpoint, (4, 4, 64, 64), "contiguous", 4)


def test_other_modules_of_the_layer_are_left_alone():
    """Names match whole: in_proj_b is not in_proj_ba, and conv1d is no projection."""
    others = {"conv1d.weight": torch.ones(3), "A_log": torch.ones(6), "norm.weight": torch.ones(4)}
    packed = pack_all(good() | others, (2, 6, 4, 4), "contiguous", 1)[0]
    assert packed.keys() == {"in_proj_qkvz.weight", "in_proj_ba.weight"}


def test_unpacking_refuses_ranks_that_do_not_fit():
    """No rank at all, ranks of different content, a form that does not exist."""
    ranks = pack_all(good(), (2, 6, 4, 4), "contiguous", 2)
    options = {"head_k_dim": 4, "head_v_dim": 4, "layout": "contiguous"}
    short = {**ranks[1], "in_proj_qkvz.weight": ranks[1]["in_proj_qkvz.weight"][:-1]}
    extra = {**ranks[1], "in_proj_qkvz.bias": torch.ones(32)}
    for wrong, form, message in (
        ([], "split", "ranks: found none, needed at least one"),
        ([ranks[0], extra], "split", r"ranks: found \['weight'\] and \['bias', 'weight'\], needed"),
        ([ranks[0], short], "split", r"weight of rank 1.shape: found \(31, 2\), needed 32 rows: q"),
        (ranks, "packed", "form: found 'packed', needed 'fused' or 'split'"),
    ):
        with pytest.raises(InputError, match=message):
            unpack_gdn(wrong, **options, form=form)


def test_views_refuse_widths_without_whole_heads():
    """The same equations as the op's."""
    with pytest.raises(InputError, match=r"columns of ba: found 7, needed 2 \* num_v_heads"):
        split_qkvzba(torch.ones(2, 64), torch.ones(2, 7), head_k_dim=4, head_v_dim=4)
    with pytest.raises(
        InputError, match=r"columns of qkvz: found 66, needed 2 \* num_k_heads \* 4"
    ):
        split_qkvzba(torch.ones(2, 66), torch.ones(2, 12), head_k_dim=4, head_v_dim=4)

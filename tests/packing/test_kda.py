"""KDA weights: eight projections into two parameters, on any number of ranks, and back."""

import pytest
import torch

from hwfuse import InputError
from hwfuse.packing import (
    kda_shards,
    kda_views,
    pack_kda,
    shard_rows,
    split_qkvbfg,
    unpack_kda,
)
from hwfuse_reference.torch_ops.fused_qkvbfg import fused_qkvbfg

H, D, C = 8, 4, 12
STACKED = ("q", "k", "v", "b", "f_a", "g_a")
NAMES = (*STACKED, "f_b", "g_b")
BIASES = {"f_b_proj.bias": torch.arange(32.0), "g_b_proj.bias": torch.arange(32.0, 64.0)}


def checkpoint(num_heads=H, head_dim=D, hidden_size=C, seed=0):
    """Return eight weights of small whole numbers: their products and sums are exact."""
    generator = torch.Generator().manual_seed(seed)
    p = num_heads * head_dim
    rows = dict(zip(NAMES, (p, p, p, num_heads, head_dim, head_dim, p, p), strict=True))
    return {
        f"{name}_proj.weight": torch.randint(
            -4, 5, (n, hidden_size if name in STACKED else head_dim), generator=generator
        ).float()
        for name, n in rows.items()
    }


def pack_all(weights, tp_size):
    """Pack for every rank."""
    return [pack_kda(weights, tp_rank=t, tp_size=tp_size) for t in range(tp_size)]


def assert_same(found, expected):
    """Assert equal names and bits."""
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        assert found[key].is_contiguous()
        assert torch.equal(found[key], tensor)


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
@pytest.mark.parametrize("biases", [(), ("g_b_proj.bias",), tuple(BIASES)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_ranks_unpack_to_the_checkpoint(dtype, biases, tp_size):
    """There and back, with and without biases of the gates."""
    weights = checkpoint() | {name: BIASES[name] for name in biases}
    weights = {key: tensor.to(dtype) for key, tensor in weights.items()}
    assert_same(unpack_kda(pack_all(weights, tp_size)), weights)


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
def test_packed_weights_equal_the_stacked_slices_of_each_rank(tp_size):
    """Heads are dealt out, f_a and g_a are whole on every rank; slot 0 is f_b, slot 1 is g_b."""
    weights = checkpoint() | BIASES
    for t, rank in enumerate(pack_all(weights, tp_size)):
        mine = {key: tensor.tensor_split(tp_size)[t] for key, tensor in weights.items()}
        mine |= {f"{name}_proj.weight": weights[f"{name}_proj.weight"] for name in ("f_a", "g_a")}
        stacks = {
            "w_qkvbfg": torch.cat([mine[f"{name}_proj.weight"] for name in STACKED]),
            "w_fg": torch.stack([mine["f_b_proj.weight"], mine["g_b_proj.weight"]]),
        }
        assert_same(rank, stacks | {name: mine[name] for name in BIASES})


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
def test_op_on_each_rank_gives_its_heads_of_the_eight_projections(tp_size):
    """Joined over the ranks, the op's results are those of the unsharded model."""
    weights = {key.removesuffix("_proj.weight"): t for key, t in checkpoint().items()}
    x = torch.randint(-2, 3, (5, C), generator=torch.Generator().manual_seed(1)).float()
    q, k, v, b, f_a, g_a = (x @ weights[name].t() for name in STACKED)
    results = [fused_qkvbfg(x, r["w_qkvbfg"], r["w_fg"]) for r in pack_all(checkpoint(), tp_size)]
    parts = [split_qkvbfg(qkvbfg, head_dim=D) for qkvbfg, _ in results]
    qkv = [mixed_qkv.chunk(3, dim=1) for mixed_qkv, _, _ in parts]
    for i, whole in enumerate((q, k, v)):
        assert torch.equal(torch.cat([rank[i] for rank in qkv], dim=1), whole)
    assert torch.equal(torch.cat([mine for _, mine, _ in parts], dim=1), b)
    assert all(torch.equal(fg, torch.cat([f_a, g_a], dim=1)) for _, _, fg in parts)
    forget, output = torch.cat([gates for _, gates in results], dim=2)
    assert torch.equal(forget, f_a @ weights["f_b"].t())
    assert torch.equal(output, g_a @ weights["g_b"].t())


@pytest.mark.parametrize("pair", [("f_a", "g_a"), ("f_b", "g_b"), ("q", "k"), ("k", "v")])
def test_swapped_projections_change_what_is_packed(pair):
    """Negative control of all tests above: their shapes are equal, so only values tell."""
    weights = checkpoint()
    first, second = (f"{name}_proj.weight" for name in pair)
    swapped = weights | {first: weights[second], second: weights[first]}
    right, wrong = pack_kda(weights), pack_kda(swapped)
    assert any(not torch.equal(right[name], wrong[name]) for name in right)


@pytest.mark.parametrize(
    ("num_heads", "tp_size", "num_rows"),
    [(32, 1, 12576), (32, 4, 3336), (32, 8, 1796), (64, 1, 24896), (64, 4, 6416), (64, 8, 3336)],
)
def test_released_models_have_the_published_number_of_rows(num_heads, tp_size, num_rows):
    """Kimi Linear 48B (32 heads) and GLM-5.3-Flash (64)."""
    shards = kda_shards(num_heads=num_heads, head_dim=128)
    last = shard_rows(shards, "g_a", tp_rank=tp_size - 1, tp_size=tp_size)
    assert last == (slice(num_rows - 128, num_rows), slice(0, 128))
    meta = {k: t.to("meta") for k, t in checkpoint(num_heads, 128, 16).items()}
    packed = pack_kda(meta, tp_rank=tp_size - 1, tp_size=tp_size)
    assert packed["w_qkvbfg"].shape == (num_rows, 16)
    assert packed["w_fg"].shape == (2, num_heads * 128 // tp_size, 128)
    assert all(t.is_meta for t in unpack_kda([packed] * tp_size).values())


def test_destination_rows_count_the_rank_s_shards_and_not_the_model_s():
    """The offset of v is 2p, not 2P."""
    rows = shard_rows(kda_shards(num_heads=H, head_dim=D), "v", tp_rank=3, tp_size=4)
    assert rows == (slice(16, 24), slice(24, 32))


def test_views_name_the_eight_weights_in_the_memory_of_the_two():
    """Parameters that are views keep a state dict's names without a second copy."""
    weights = checkpoint()
    packed = pack_kda(weights)
    views = kda_views(packed["w_qkvbfg"], packed["w_fg"])
    assert_same(views, weights)
    storages = {t.untyped_storage().data_ptr() for t in packed.values()}
    assert {t.untyped_storage().data_ptr() for t in views.values()} == storages


def test_packed_weights_are_new_memory():
    """A parameter must not keep the checkpoint's memory alive, nor change with it."""
    weights = checkpoint() | BIASES
    packed = pack_kda(weights)
    tensors = [*weights.values(), *packed.values(), *unpack_kda([packed]).values()]
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)


@pytest.mark.parametrize("lead", [(5,), (2, 3), (0,)])
def test_result_is_sliced_without_a_copy(lead):
    """All three parts are views with the row stride of the whole."""
    qkvbfg = torch.randn(*lead, 3 * 24 + 6 + 8)
    parts = split_qkvbfg(qkvbfg, head_dim=4)
    assert [part.shape[-1] for part in parts] == [72, 6, 8]
    assert torch.equal(torch.cat(parts, dim=-1), qkvbfg)
    assert all(p.untyped_storage()._cdata == qkvbfg.untyped_storage()._cdata for p in parts)


@pytest.mark.parametrize("kind", ["weight_scale_inv", "weight_scale", "weight_packed"])
@pytest.mark.parametrize("name", NAMES)
def test_one_quantised_projection_of_the_eight_forbids_fusing(name, kind):
    """Whatever the scheme: the stacked GEMM has one dtype and no scales."""
    weights = checkpoint() | {f"{name}_proj.{kind}": torch.ones(1)}
    message = f"{name}_proj.{kind}: found torch.float32, needed .* of which one is quantised stay"
    with pytest.raises(InputError, match=message):
        pack_kda(weights)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("name", NAMES)
def test_weight_of_a_quantised_dtype_forbids_fusing(name, dtype):
    """Also where the scale lies elsewhere."""
    weights = checkpoint()
    key = f"{name}_proj.weight"
    with pytest.raises(InputError, match=f"{key}: found {dtype}, needed bfloat16, float16 or"):
        pack_kda(weights | {key: weights[key].to(dtype)})


def test_quantised_module_beside_the_eight_changes_nothing():
    """o_proj may have any scheme."""
    others = {
        "o_proj.weight": torch.ones(4, dtype=torch.int8),
        "o_proj.weight_scale": torch.ones(1),
    }
    assert_same(pack_kda(checkpoint() | others), pack_kda(checkpoint()))


W = {name: f"{name}_proj.weight" for name in NAMES}
BAD = {
    "tp_size": ({}, {"tp_size": 3}, "tp_size: found 3, needed 1 or 2 or 4 or 8: 8 heads of 4 rows"),
    "more ranks than heads": ({}, {"tp_size": 16}, "tp_size: found 16, needed 1 or 2 or 4 or 8"),
    "tp_rank": ({}, {"tp_rank": -1}, "tp_rank: found -1, needed 0 to 0"),
    "missing": ({W["f_b"]: None}, {}, f"{W['f_b']}: found nothing, needed a tensor"),
    "bias": ({"q_proj.bias": torch.ones(32)}, {}, "q_proj.bias: found a bias, needed none: only"),
    "rows": (
        {W["k"]: torch.ones(28, C)},
        {},
        r"k_proj.weight.shape: found \(28, 12\), needed 32 rows: k 32",
    ),
    "beta": ({W["b"]: torch.ones(4, C)}, {}, r"f_b_proj.weight: found .* \(32, 4\), .* \(16, 4\)"),
    "low rank": ({W["g_a"]: torch.ones(8, C)}, {}, r"g_a_proj.weight.shape: found \(8, 12\), .*4"),
    "channels": ({W["v"]: torch.ones(32, 5)}, {}, r"v_proj.weight.shape: found \(32, 5\), .*12\)"),
    "dtype": ({W["v"]: torch.ones(32, C).half()}, {}, "v_proj.weight.dtype: found torch.float16"),
    "gate": ({W["g_b"]: torch.ones(32, 5)}, {}, r"g_b_proj.weight: found .*\(32, 5\), .*\(32, 4\)"),
    "gate dtype": (
        {W["g_b"]: torch.ones(32, D).half()},
        {},
        "g_b_proj.weight: found torch.float16",
    ),
    "bias shape": (
        {"g_b_proj.bias": torch.ones(8)},
        {},
        r"g_b_proj.bias.shape: found \(8,\), .*32",
    ),
}


@pytest.mark.parametrize(("change", "options", "message"), BAD.values(), ids=BAD)
def test_bad_checkpoint_is_refused_with_what_was_found_and_needed(change, options, message):
    """An error at load time, never a plausible wrong weight."""
    weights = {key: t for key, t in (checkpoint() | change).items() if t is not None}
    with pytest.raises(InputError, match=message):
        pack_kda(weights, **options)


RANK = pack_kda(checkpoint())
BAD_RANKS = {
    "none": ([], "ranks: found none, needed w_qkvbfg and w_fg"),
    "missing": ([{"w_fg": RANK["w_fg"]}], r"ranks: found \['w_fg'\], needed w_qkvbfg and w_fg"),
    "one bias": ([RANK, RANK | BIASES], "ranks: found .*, needed .* and the same biases"),
    "one gate": (
        [RANK | {"w_fg": RANK["w_fg"][:1]}],
        r"w_fg.shape: found \(1, 32, 4\), needed \[2",
    ),
    "rows": (
        [RANK | {"w_qkvbfg": RANK["w_qkvbfg"][1:]}],
        r"weight of rank 0.shape: found \(111, 12",
    ),
}


@pytest.mark.parametrize(("ranks", "message"), BAD_RANKS.values(), ids=BAD_RANKS)
def test_unpacking_refuses_ranks_that_do_not_fit(ranks, message):
    """The two weights must describe the same heads."""
    with pytest.raises(InputError, match=message):
        unpack_kda(ranks)


def test_views_and_slices_refuse_shapes_without_whole_heads():
    """As the op does."""
    with pytest.raises(
        InputError, match=r"w_qkvbfg.shape: found \(111, 12\), needed \[112, hidden"
    ):
        kda_views(RANK["w_qkvbfg"][1:], RANK["w_fg"])
    with pytest.raises(InputError, match=r"qkvbfg.shape\[-1\]: found 111, needed num_heads \* 13"):
        split_qkvbfg(torch.ones(2, 111), head_dim=4)
    with pytest.raises(InputError, match="head_dim: found 0, needed a positive number"):
        split_qkvbfg(torch.ones(2, 112), head_dim=0)

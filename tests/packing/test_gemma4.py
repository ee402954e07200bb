"""Gemma4's projections: the mode decides what is stacked and which op norms it."""

import pytest
import torch

import hwfuse
from hwfuse import InputError
from hwfuse.packing import QKVNormMode, pack_gemma4, shard_rows, unpack_gemma4

MODES = list(QKVNormMode)
STACKED = {QKVNormMode.Q: "q", QKVNormMode.Q_KEQV: "qk", QKVNormMode.QKV: "qkv"}


def checkpoint(mode, num_q_heads, num_kv_heads, head_dim, hidden_size=3):
    """Return a layer's weights, of distinct numbers."""
    rows = {"q": num_q_heads, "k": num_kv_heads, "v": num_kv_heads}
    rows = {name: rows[name] * head_dim for name in STACKED[mode]}
    numbers = torch.arange(sum(rows.values()) * hidden_size).view(-1, hidden_size).float()
    parts = numbers.split(list(rows.values()))
    return {f"{name}_proj.weight": part.clone() for name, part in zip(rows, parts, strict=True)}


def pack_all(weights, mode, head_dim, tp_size):
    """Pack for every rank."""
    options = {"head_dim": head_dim, "tp_size": tp_size}
    return [pack_gemma4(weights, mode, **options, tp_rank=t) for t in range(tp_size)]


def assert_same(found, expected):
    """Assert equal names and bits."""
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_layer_s_mode_follows_from_what_it_lacks():
    """A layer that shares keys and values has neither projection, whatever k = v says."""
    assert QKVNormMode.of(is_kv_shared=True, is_k_eq_v=False) is QKVNormMode.Q
    assert QKVNormMode.of(is_kv_shared=True, is_k_eq_v=True) is QKVNormMode.Q
    assert QKVNormMode.of(is_kv_shared=False, is_k_eq_v=True) is QKVNormMode.Q_KEQV
    assert QKVNormMode.of(is_kv_shared=False, is_k_eq_v=False) is QKVNormMode.QKV


@pytest.mark.parametrize("mode", MODES)
def test_mode_names_an_op_that_takes_what_is_stacked(mode):
    """The norm's tensors are those of the projection, and k = v is one of them."""
    tensors = [name for name in hwfuse.op(mode.value).spec.tensors if "weight" not in name]
    assert tensors == {"q": ["q"], "qk": ["q", "kv"], "qkv": ["q", "k", "v"]}[STACKED[mode]]


@pytest.mark.parametrize(
    ("mode", "heads", "tp_size", "num_rows"),
    [
        (QKVNormMode.QKV, (32, 16, 256), 1, 16384),  # 31B, sliding
        (QKVNormMode.Q_KEQV, (32, 4, 512), 1, 18432),  # 31B, full: 20480 if v were loaded twice
        (QKVNormMode.Q_KEQV, (32, 4, 512), 8, 2560),  # 4 + 1 heads: two ranks share each kv head
        (QKVNormMode.Q, (8, 1, 256), 2, 1024),  # E2B, shared
        (QKVNormMode.QKV, (8, 1, 256), 2, 1536),  # E2B, donor
    ],
)
def test_projection_size_is_that_of_the_released_models(mode, heads, tp_size, num_rows):
    """Rows of the packed weight on each rank."""
    sizes = dict(zip(("num_q_heads", "num_kv_heads", "head_dim"), heads, strict=True))
    assert mode.projection_size(**sizes, tp_size=tp_size) == num_rows
    meta = {k: t.to("meta") for k, t in checkpoint(mode, *heads).items()}
    packed = pack_gemma4(meta, mode, head_dim=heads[2], tp_size=tp_size)
    assert packed["qkv_proj.weight"].shape == (num_rows, 3)
    back = unpack_gemma4([packed] * tp_size, mode, **sizes)
    assert {k: t.shape for k, t in back.items()} == {k: t.shape for k, t in meta.items()}


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4, 8])
@pytest.mark.parametrize("mode", MODES)
def test_ranks_hold_their_heads_and_unpack_to_the_checkpoint(mode, num_kv_heads, tp_size):
    """With more ranks than kv heads neighbours share one: rank t has head t * Hkv // tp."""
    weights = checkpoint(mode, 8, num_kv_heads, 4)
    ranks = pack_all(weights, mode, 4, tp_size)
    for t, rank in enumerate(ranks):
        expected = []
        for name in STACKED[mode]:
            heads = weights[f"{name}_proj.weight"].split(4)
            first, count = t * len(heads) // tp_size, max(1, len(heads) // tp_size)
            expected += heads[first : first + count]
        assert_same(rank, {"qkv_proj.weight": torch.cat(expected)})
    sizes = {"num_q_heads": 8, "num_kv_heads": num_kv_heads, "head_dim": 4}
    assert_same(unpack_gemma4(ranks, mode, **sizes), weights)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("mode", MODES)
def test_scales_and_biases_go_where_their_rows_go(mode, tp_size):
    """Block scales in units of 128 rows, also of a shared head; a scalar for each projection."""
    weights = checkpoint(mode, 4, 2, 256)
    layer = dict(weights)
    for i, (key, weight) in enumerate(weights.items()):
        layer[key.replace("weight", "bias")] = weight[:, 0].clone()
        layer[key.replace("weight", "weight_scale_inv")] = weight[::128].clone()
        layer[key.replace("weight", "input_scale")] = torch.tensor(float(i))
    ranks = pack_all(layer, mode, 256, tp_size)
    for rank in ranks:
        packed = {key.removeprefix("qkv_proj."): t for key, t in rank.items()}
        assert torch.equal(packed["bias"], packed["weight"][:, 0])
        assert torch.equal(packed["weight_scale_inv"], packed["weight"][::128])
        assert packed["input_scale"].tolist() == list(range(len(weights)))
    sizes = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 256}
    assert_same(unpack_gemma4(ranks, mode, **sizes), layer)


def test_unused_keys_and_norms_of_the_layer_are_left_alone():
    """A layer in mode Q may still have a k_proj in its file."""
    layer = checkpoint(QKVNormMode.QKV, 4, 2, 4) | {"q_norm.weight": torch.ones(4)}
    packed = pack_gemma4(layer, QKVNormMode.Q, head_dim=4)
    assert_same(packed, {"qkv_proj.weight": layer["q_proj.weight"]})


def test_shared_head_is_the_source_of_several_ranks():
    """Where a streaming loader takes and puts the rows of v."""
    shards = QKVNormMode.QKV.shards(num_q_heads=8, num_kv_heads=2, head_dim=4)
    rows = [shard_rows(shards, "v", tp_rank=t, tp_size=4) for t in range(4)]
    assert all(row.destination == slice(12, 16) for row in rows)
    assert [row.source.start for row in rows] == [0, 0, 4, 4]


def layer_of(**change):
    """Return a QKV layer of 4 and 2 heads of 4 with some tensors replaced or removed."""
    layer = checkpoint(QKVNormMode.QKV, 4, 2, 4)
    layer |= {f"{name}_proj.weight": tensor for name, tensor in change.items()}
    return {key: tensor for key, tensor in layer.items() if tensor is not None}


QKV = QKVNormMode.QKV
BAD = {
    "v in k = v": (
        layer_of(),
        QKVNormMode.Q_KEQV,
        {},
        "v_proj: found a tensor, needed none: in mo",
    ),
    "no v": (layer_of(v=None), QKV, {}, "v_proj.weight: found nothing, needed a tensor, as q_proj"),
    "no k": (layer_of(k=None), QKV, {}, "k_proj.weight: found nothing, needed a tensor"),
    "no q": (layer_of(q=None), QKVNormMode.Q, {}, "q_proj.weight: found nothing, needed a tensor"),
    "heads": (
        layer_of(k=torch.ones(6, 3)),
        QKV,
        {},
        r"k_proj.weight.shape: found \(6, 3\), .* of 4 r",
    ),
    "v heads": (
        layer_of(v=torch.ones(4, 3)),
        QKV,
        {},
        r"v_proj.weight.shape: found \(4, 3\), .*8 r",
    ),
    "head_dim": (layer_of(), QKV, {"head_dim": 0}, "head_dim: found 0, needed a positive number"),
    "tp_size": (
        layer_of(),
        QKV,
        {"tp_size": 8},
        "tp_size: found 8, needed 1 or 2 or 4: 4 heads of",
    ),
    "kv heads": (
        layer_of(q=torch.ones(24, 3)),
        QKV,
        {"tp_size": 3},
        "tp_size: found 3, needed 1 or 2 or a multiple of 2: 2 heads of 4 rows in k",
    ),
}


@pytest.mark.parametrize(("layer", "mode", "options", "message"), BAD.values(), ids=BAD)
def test_bad_layer_is_refused_with_what_was_found_and_needed(layer, mode, options, message):
    """An error at load time, never a plausible wrong weight."""
    with pytest.raises(InputError, match=message):
        pack_gemma4(layer, mode, **{"head_dim": 4} | options)


def test_unpacking_refuses_head_counts_that_do_not_give_the_rows():
    """The counts are the caller's word: the packed rows alone do not tell q from k."""
    ranks = pack_all(layer_of(), QKV, 4, 2)
    with pytest.raises(
        InputError, match=r"weight of rank 0.shape: found \(16, 3\), needed 24 rows"
    ):
        unpack_gemma4(ranks, QKV, num_q_heads=8, num_kv_heads=2, head_dim=4)
    with pytest.raises(InputError, match="ranks: found none, needed at least one"):
        unpack_gemma4([], QKV, num_q_heads=4, num_kv_heads=2, head_dim=4)

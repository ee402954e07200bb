"""Tensor parallelism: what two ranks compute from their slices is what one process computes.

The classes `…OnARank` are tests that pytest runs in two processes at once, in the same order, where
`dist` connects them; the functions at the end start those.
"""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import hwfuse
from hwfuse import packing
from hwfuse.integrations import _tiny
from hwfuse.integrations.transformers import patch
from hwfuse.packing import QKVNormMode

RANKS = 2
OTHER = Path(os.environ.get("TRANSFORMERS_OTHER", Path(sys.prefix) / "transformers-5.17"))
RUN = """
import sys, pytest
status = pytest.main(sys.argv[2:])
found = sys.modules["transformers"].__file__ if sys.argv[1] else ""
assert found.startswith(sys.argv[1]), found
sys.exit(status)
"""


@pytest.fixture(scope="session")
def rank():
    """The number of this process, connected to the other one; gloo needs no device."""
    rank = int(os.environ["RANK"])
    dist.init_process_group(
        "gloo",
        init_method=f"file://{os.environ['SHARED_FOLDER']}/store",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=60),
    )
    yield rank
    dist.destroy_process_group()


def gathered(local, dim=1):
    """Return the shards of all ranks, joined."""
    shards = [torch.empty_like(local, memory_format=torch.contiguous_format) for _ in range(RANKS)]
    dist.all_gather(shards, local.contiguous())
    return torch.cat(shards, dim)


def summed(local):
    """Return the sum over all ranks, in float32."""
    total = local.to(torch.float32, copy=True)
    dist.all_reduce(total)
    return total


def full(tensor):
    """Return all of a tensor of which this rank may have a part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_numbers(*shape, seed=0):
    """Return numbers whose products have exact sums, so that a GEMM's order does not show."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


def assert_sum_of_rounded(shards, whole):
    """Assert a sum of shards that were each rounded to bfloat16; the whole was, once.

    A rounding is off by 2**-8 of its number at most, and the whole is no larger than its shards
    together.  2**-16 is for the order of float32 sums.
    """
    bound = (2**-7 + 2**-16) * summed(shards.abs())
    assert ((summed(shards) - whole.float()).abs() <= bound).all()


HK, HV, DK, DV, HIDDEN = 4, 8, 3, 5, 16  # gated delta net
GDN = {"head_k_dim": DK, "head_v_dim": DV}


def gdn_checkpoint(form):
    """Return the projections of a gated delta net; both forms are the same model."""
    fused = {
        "in_proj_qkvz.weight": whole_numbers(2 * HK * DK + 2 * HV * DV, HIDDEN),
        "in_proj_ba.weight": whole_numbers(2 * HV, HIDDEN, seed=1),
    }
    if form == "fused":
        return fused
    packed = packing.pack_gdn(fused, layout="contiguous", **GDN)
    return packing.unpack_gdn([packed], layout="contiguous", form=form, **GDN)


def gdn_results(packed, layout):
    """Run both GEMMs and the op."""
    x = whole_numbers(7, HIDDEN, seed=2)
    qkvz, ba = (x @ packed[f"in_proj_{name}.weight"].t() for name in ("qkvz", "ba"))
    return hwfuse.op("fused_qkvzba")(qkvz, ba, layout=layout, **GDN)


@pytest.mark.parametrize("layout", ["interleaved", "contiguous"])
class GDNOnARank:
    """fused_qkvzba behind the weights of `pack_gdn`."""

    @pytest.mark.parametrize("form", ["fused", "split"])
    def test_results_from_packed_slices_are_those_of_the_rank_s_heads(self, rank, form, layout):
        """z, b and a gather along heads; mixed_qkv is each rank's own q|k|v."""
        weights = gdn_checkpoint(form)
        mixed_qkv, *zba = gdn_results(packing.pack_gdn(weights, layout=layout, **GDN), layout)
        mine = packing.pack_gdn(weights, layout=layout, **GDN, tp_rank=rank, tp_size=RANKS)
        my_mixed_qkv, *my_zba = gdn_results(mine, layout)
        for found, expected in zip(my_zba, zba, strict=True):
            assert torch.equal(gathered(found), expected)
        q, k, v = (part.chunk(RANKS, 1)[rank] for part in mixed_qkv.split([12, 12, 40], dim=1))
        assert torch.equal(my_mixed_qkv, torch.cat([q, k, v], dim=1))
        assert not torch.equal(gathered(my_mixed_qkv), mixed_qkv)

    def test_even_split_of_packed_rows_is_wrong_where_they_are_contiguous(self, rank, layout):
        """Whole groups of interleaved heads may be cut apart; [q|k|v|z] may not."""
        whole = packing.pack_gdn(gdn_checkpoint("fused"), layout=layout, **GDN)
        halves = {name: tensor.chunk(RANKS)[rank] for name, tensor in whole.items()}
        _, z, b, a = gdn_results(whole, layout)
        _, *mine = gdn_results(halves, layout)
        is_right = [torch.equal(gathered(m), w) for m, w in zip(mine, (z, b, a), strict=True)]
        assert is_right == [layout == "interleaved"] * 3


H, D = 4, 6  # Kimi delta attention
P = H * D


def kda_checkpoint():
    """Return the eight projections of a Kimi delta attention layer."""
    rows = {"q": P, "k": P, "v": P, "b": H, "f_a": D, "g_a": D, "f_b": P, "g_b": P}
    return {
        f"{name}_proj.weight": whole_numbers(n, D if name[1:] == "_b" else HIDDEN, seed=seed)
        for seed, (name, n) in enumerate(rows.items())
    }


class KDAOnARank:
    """fused_qkvbfg with the weights of `pack_kda`."""

    X = whole_numbers(7, HIDDEN, seed=9)

    def test_results_from_packed_slices_are_those_of_the_rank_s_heads(self, rank):
        """q, k, v, beta and both gates are sharded by head; the low ranks are whole everywhere."""
        op = hwfuse.op("fused_qkvbfg")
        qkvbfg, gates = op(self.X, **packing.pack_kda(kda_checkpoint()))
        mine = packing.pack_kda(kda_checkpoint(), tp_rank=rank, tp_size=RANKS)
        my_qkvbfg, my_gates = op(self.X, **mine)
        qkv, b, fg = packing.split_qkvbfg(qkvbfg, head_dim=D)
        my_qkv, my_b, my_fg = packing.split_qkvbfg(my_qkvbfg, head_dim=D)
        for found, expected in zip(my_qkv.chunk(3, 1), qkv.chunk(3, 1), strict=True):
            assert torch.equal(gathered(found), expected)
        assert torch.equal(gathered(my_b), b)
        assert torch.equal(my_fg, fg)
        assert torch.equal(gathered(my_gates, dim=2), gates)

    def test_slices_of_the_low_ranks_are_refused_or_wrong(self, rank):
        """Each head needs the whole of f_a and g_a."""
        op, weights = hwfuse.op("fused_qkvbfg"), kda_checkpoint()
        _, gates = op(self.X, **packing.pack_kda(weights))
        mine = packing.pack_kda(weights, tp_rank=rank, tp_size=RANKS)
        rows, low_ranks = mine["w_qkvbfg"].split([len(mine["w_qkvbfg"]) - 2 * D, 2 * D])
        halves = [low_rank.chunk(RANKS)[rank] for low_rank in low_ranks.chunk(2)]
        with pytest.raises(hwfuse.InputError, match="w_qkvbfg"):
            op(self.X, torch.cat([rows, *halves]), mine["w_fg"])
        filled = [half for half in halves for _ in range(RANKS)]
        _, my_gates = op(self.X, torch.cat([rows, *filled]), mine["w_fg"])
        assert not torch.equal(gathered(my_gates, dim=2), gates)


class Gemma4OnARank:
    """The norms behind the weights of `pack_gemma4`."""

    @pytest.mark.parametrize("num_kv_heads", [1, 2])
    @pytest.mark.parametrize("mode", list(QKVNormMode))
    def test_norms_of_packed_slices_are_those_of_the_rank_s_heads(self, rank, mode, num_kv_heads):
        """Heads are sharded; a single head of keys and values is on every rank."""
        heads = {"num_q_heads": 4, "num_kv_heads": num_kv_heads, "head_dim": 8}
        shards = mode.shards(**heads)
        weights = {
            f"{shard.name}_proj.weight": whole_numbers(shard.rows_on_rank(1), HIDDEN, seed=seed)
            for seed, shard in enumerate(shards)
        }
        whole = self.results(mode, weights, shards)
        mine = self.results(mode, weights, shards, tp_rank=rank, tp_size=RANKS)
        for i, (found, expected) in enumerate(zip(mine, whole, strict=True)):
            is_shared = i > 0 and num_kv_heads == 1
            assert torch.equal(found if is_shared else gathered(found), expected)

    def results(self, mode, weights, shards, **rank):
        """Run the GEMM and the op of this mode."""
        packed = packing.pack_gemma4(weights, mode, head_dim=8, **rank)["qkv_proj.weight"]
        widths = [shard.rows_on_rank(rank.get("tp_size", 1)) for shard in shards]
        parts = (whole_numbers(7, HIDDEN, seed=5) @ packed.t()).split(widths, dim=1)
        norms = [torch.linspace(0.5, 2, 8), torch.linspace(3, 1, 8)]
        results = hwfuse.op(mode.value)(*parts, *norms[: len(parts)], head_dim=8)
        return [results] if isinstance(results, torch.Tensor) else results


class FP8OnARank:
    """Block-scaled fp8: quantised activations, and both ways to shard a weight."""

    @pytest.fixture
    def call(self):
        """The arguments of a GEMM whose weight has four blocks each way."""
        return hwfuse.op("fp8_blockscale_gemm").spec.make_inputs(m=5, n=512, k=512)

    @pytest.mark.parametrize("num_rows", [512, 320])
    def test_shards_of_weight_rows_give_shards_of_the_result(self, rank, call, num_rows):
        """Column-parallel: whole blocks of 128 rows go with their scales; the last may be short."""
        gemm = hwfuse.op("fp8_blockscale_gemm")
        call["b"], call["b_scale"] = call["b"][:num_rows], call["b_scale"][: -(-num_rows // 128)]
        whole = gemm(**call)
        rows, blocks = slice(256 * rank, 256 * rank + 256), slice(2 * rank, 2 * rank + 2)
        mine = gemm(**call | {"b": call["b"][rows], "b_scale": call["b_scale"][blocks]})
        padded = torch.nn.functional.pad(mine, (0, 256 - mine.shape[1]))
        assert torch.equal(gathered(padded)[:, :num_rows], whole)

    def test_shards_of_weight_columns_give_parts_of_the_sum(self, rank, call):
        """Row-parallel: blocks of 128 columns go with the scales of both sides."""
        gemm = hwfuse.op("fp8_blockscale_gemm")
        mine = {name: call[name].chunk(RANKS, 1)[rank] for name in ("a", "a_scale", "b", "b_scale")}
        assert_sum_of_rounded(gemm(**mine), gemm(**call))
        swapped = mine | {"b_scale": call["b_scale"].chunk(RANKS, 1)[1 - rank]}
        with pytest.raises(AssertionError):
            assert_sum_of_rounded(gemm(**swapped), gemm(**call))

    def test_groups_of_sharded_columns_are_quantised_alike(self, rank):
        """What a row-parallel GEMM reads; gloo carries no fp8, so the codes travel as bytes."""
        quant = hwfuse.op("fp8_group_quant")
        x = quant.spec.make_inputs(m=5, k=512)["x"]
        whole, mine = quant(x), quant(x.chunk(RANKS, 1)[rank])
        for found, expected in zip(mine, whole, strict=True):
            assert torch.equal(gathered(found.view(torch.uint8)), expected.view(torch.uint8))


class ExpertsOnARank:
    """w4a8_moe where each rank has some of the experts."""

    def test_results_of_sharded_experts_sum_to_the_whole(self, rank):
        """Routes to experts of the other rank add nothing; the model scales the sum, once.

        Expert ids count from the first expert of the rank, so the other's are out of range.
        """
        moe = hwfuse.op("w4a8_moe")
        call = moe.spec.make_inputs(
            m=9, n=128, k=256, topk=3, num_experts=8, routed_scaling_factor=1.0
        )
        whole = moe(**call)
        names = ("w13", "w13_scale", "w2", "w2_scale")
        mine = call | {name: call[name].chunk(RANKS)[rank] for name in names}
        assert_sum_of_rounded(moe(**mine | {"topk_ids": call["topk_ids"] - 4 * rank}), whole)
        with pytest.raises(AssertionError):
            assert_sum_of_rounded(moe(**mine), whole)


FAMILIES = {
    "qwen3_next": ("linear_attn.in_proj_qkvz", {"fused_qkvzba": 3}),
    "gemma4": (
        "self_attn.q_proj",
        {"qkv_rms_norm": 1, "q_keqv_rms_norm": 1, "q_rms_norm": 2},
    ),
}
IDS = torch.tensor([[5, 17, 101, 7, 64, 30, 9, 88, 41, 3, 77, 19]])


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """The name of a family; its tests share what is built for it."""
    return request.param


@pytest.fixture(scope="module")
def whole(rank, family):
    """The model of one process; a checkpoint of it is in the folder that ranks share."""
    model = getattr(_tiny, f"tiny_{family}")()
    if rank == 0:
        model.save_pretrained(Path(os.environ["SHARED_FOLDER"], family))
    dist.barrier()
    return model


@pytest.fixture
def sharded(whole, family):
    """The same model, sharded by transformers."""
    from transformers.distributed import DistributedConfig

    model = type(whole).from_pretrained(
        Path(os.environ["SHARED_FOLDER"], family),
        distributed_config=DistributedConfig(tp_plan="auto"),
    )
    linear = model.get_submodule(f"model.layers.0.{FAMILIES[family][0]}")
    assert linear.weight.to_local().shape[0] * RANKS == linear.weight.shape[0]
    return model


class ModelsOnARank:
    """Patched models that transformers shards by their own plan."""

    @torch.no_grad()
    def test_patch_of_a_sharded_model_keeps_every_bit_of_its_logits(self, family, sharded):
        """Its linears stay its own; the op gets what this rank has of the heads."""
        expected = sharded(IDS).logits
        patch(sharded)
        with hwfuse.record() as record:
            assert torch.equal(sharded(IDS).logits, expected)
        assert {op: count for (op, _), count in record.calls.items()} == FAMILIES[family][1]

    @torch.no_grad()
    def test_logits_of_a_patched_sharded_model_are_those_of_the_whole(self, whole, sharded):
        """Sums over ranks are taken in another order: 4e-6 apart, logits being about 1."""
        patch(sharded)
        torch.testing.assert_close(sharded(IDS).logits, whole(IDS).logits, rtol=0, atol=1e-5)

    def test_patched_sharded_model_generates_the_tokens_of_the_whole(self, whole, sharded):
        """Decoding with caches of sharded heads."""
        patch(sharded)
        tokens = [
            model.generate(IDS, max_new_tokens=8, min_new_tokens=8, do_sample=False)
            for model in (whole, sharded)
        ]
        assert torch.equal(*tokens)

    def test_gradients_of_a_patched_sharded_model_are_those_of_the_whole(self, whole, sharded):
        """Norms that ranks share get the sum of the ranks' gradients."""
        patch(sharded)
        for model in (whole, sharded):
            model.zero_grad()
            model(IDS).logits.square().mean().backward()
        found = {name: full(p.grad) for name, p in sharded.named_parameters()}
        expected = {name: p.grad for name, p in whole.named_parameters()}
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def run_on_ranks(tmp_path, select, transformers=""):
    """Run the tests of this file that *select* names in two processes."""
    options = ["-q", "-x", "-p", "no:cacheprovider", "--disable-plugin-autoload"]
    arguments = [*options, "-o", "python_classes=*OnARank", "-k", select, __file__]
    shared = {
        "OMP_NUM_THREADS": "1",  # two ranks on two cores
        "PYTHONPATH": os.pathsep.join(filter(None, [transformers, os.environ.get("PYTHONPATH")])),
        "SHARED_FOLDER": str(tmp_path),
        "WORLD_SIZE": str(RANKS),
    }
    ranks, logs = [], [tmp_path / f"rank{rank}.txt" for rank in range(RANKS)]
    for rank, log in enumerate(logs):
        with log.open("w") as file:  # a pipe that nobody reads yet would stop the other rank
            process = subprocess.Popen(
                [sys.executable, "-c", RUN, transformers, *arguments],
                env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        ranks.append(process)
    status = [process.wait() for process in ranks]
    return status, "\n".join(log.read_text() for log in logs)


def test_all_above_when_run_on_two_ranks_holds(tmp_path):
    """With the transformers that is installed."""
    status, text = run_on_ranks(tmp_path, "OnARank")
    assert status == [0, 0], text


def test_models_above_when_sharded_by_the_other_transformers_hold(tmp_path):
    """Both releases shard by their own code."""
    if not OTHER.is_dir():
        stop = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        stop(f"{OTHER} is missing: `make test` installs it")
    status, text = run_on_ranks(tmp_path, "ModelsOnARank", str(OTHER))
    assert status == [0, 0], text

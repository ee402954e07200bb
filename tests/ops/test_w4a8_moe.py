"""w4a8_moe: against a loop over tokens and experts, and against the chain of its parts."""

import math

import pytest
import torch

import hwfuse
from hwfuse import InputError, packing
from hwfuse.ops.w4a8_moe import make_inputs
from hwfuse.testing.compare import rel_frobenius
from hwfuse_reference.torch_ops.w4a8_moe import w4a8_moe

SIZES = {"n": 256, "k": 512, "topk": 2, "num_experts": 4}  # w13 interleaved by 4, w2 by 1
EMPTY = torch.empty(0)


def weight(packed, scale):
    """Return the weight ``[E, N, K]`` in float64."""
    factors = packing.deinterleave_scales(scale, num_rows=packed.shape[1]).double()
    return packing.unpack_int4(packed).double() * factors.repeat_interleave(128, dim=2)


def quantised(x, scale):
    """Return what is left of float64 numbers as fp8, scaled back."""
    codes = (x / scale.double()).clamp(-448, 448).float().to(torch.float8_e4m3fn)
    return codes.double() * scale.double()


def scale_of(rows):
    """Return the dynamic scale of a list of rows."""
    largest = max([row.abs().max().item() for row in rows], default=0.0)
    return torch.tensor([max(largest, 1e-10) / 448])


def by_hand(inputs):
    """Return the result, one route at a time."""
    w13 = weight(inputs["w13"], inputs["w13_scale"])
    w2 = weight(inputs["w2"], inputs["w2_scale"])
    x, weights = inputs["x"].double(), inputs["topk_weights"].double()
    ids = inputs["topk_ids"].tolist()
    here = [(t, j, e) for t in range(len(ids)) for j, e in enumerate(ids[t]) if 0 <= e < len(w2)]
    s1, s2 = inputs["a1_scale"], inputs["a2_scale"]
    s1 = s1 if len(s1) else scale_of([x[t] for t, _, _ in here])
    gated = []
    for t, _, e in here:
        gate, up = (w13[e] @ quantised(x[t], s1)).bfloat16().double().chunk(2)
        gated.append(gate / (1 + (-gate).exp()) * up)
    s2 = s2 if len(s2) else scale_of(gated)
    out = torch.zeros(x.shape, dtype=torch.float64)
    for (t, j, e), h in zip(here, gated, strict=True):
        out[t] += weights[t, j] * (w2[e] @ quantised(h, s2)).bfloat16().double()
    return (inputs["routed_scaling_factor"] * out).bfloat16()


@pytest.mark.parametrize("is_dynamic", [False, True])
@pytest.mark.parametrize(("n", "k"), [(256, 512), (128, 128), (512, 384)])
@pytest.mark.parametrize("m", [0, 1, 4, 33])
def test_result_is_that_of_each_route_alone(m, n, k, is_dynamic):
    """Invalid routes add nothing; tokens of other ranks are NaN here."""
    inputs = make_inputs(m=m, n=n, k=k, topk=3, num_experts=5, is_dynamic=is_dynamic, row_pad=8)
    out = w4a8_moe(**inputs)
    assert (out.dtype, out.shape, out.is_contiguous()) == (torch.bfloat16, (m, k), True)
    assert rel_frobenius(out, by_hand(inputs), bound=5e-3) is None


@pytest.mark.parametrize("is_dynamic", [False, True])
def test_chain_of_the_six_ops_gives_the_same_bits(is_dynamic):
    """The op is the composition of its parts."""
    inputs = make_inputs(m=33, is_dynamic=is_dynamic, **SIZES)
    x, ids, e = inputs["x"], inputs["topk_ids"], SIZES["num_experts"]
    offsets, _, _, route_to_row, _ = hwfuse.op("w4a8_moe_prep")(ids, num_experts=e, n=256, k=512)
    s1, s2 = inputs["a1_scale"], inputs["a2_scale"]
    s1 = hwfuse.op("moe_input_scale")(x, ids, num_experts=e) if is_dynamic else s1
    a1 = hwfuse.op("moe_permute_fp8_quant")(x, route_to_row, s1)
    gemm = hwfuse.op("w4a8_grouped_gemm")
    gate_up = gemm(a1, s1, inputs["w13"], inputs["w13_scale"], offsets)
    if is_dynamic:
        gate, up = gate_up[: int(offsets[-1])].float().chunk(2, dim=1)
        s2 = (torch.nn.functional.silu(gate) * up).abs().max().view(1) / 448
    a2 = hwfuse.op("silu_mul_fp8_quant")(gate_up, s2, offsets)
    rows = gemm(a2, s2, inputs["w2"], inputs["w2_scale"], offsets)
    reduce = hwfuse.op("moe_unpermute_reduce")
    out = reduce(rows, route_to_row, inputs["topk_weights"], routed_scaling_factor=2.5)
    assert torch.equal(hwfuse.op("w4a8_moe")(**inputs), out)


@pytest.mark.parametrize("is_dynamic", [False, True])
@pytest.mark.parametrize("remote", [-1, 4, 2**31 - 1])
def test_rank_without_any_route_returns_zeros(remote, is_dynamic):
    """Every expert is empty; the tokens may be NaN."""
    inputs = make_inputs(m=5, is_dynamic=is_dynamic, **SIZES)
    inputs["x"].fill_(math.nan)
    inputs["topk_ids"].fill_(remote)
    assert (w4a8_moe(**inputs) == 0).all()


def test_token_of_another_rank_is_zero_and_changes_no_other():
    """NaN in its row spoils neither the dynamic scales nor its neighbours."""
    inputs = make_inputs(m=8, is_dynamic=True, **SIZES)
    inputs["topk_ids"][:] = torch.tensor([[0, 3]])
    inputs["topk_ids"][2::4] = torch.tensor([[-1, 4]])
    assert inputs["x"][2::4].isnan().all()
    out = w4a8_moe(**inputs)
    assert out.isfinite().all()
    assert [bool(row.any()) for row in out] == [True, True, False, True] * 2
    inputs["x"][2::4] = 0.0
    assert torch.equal(w4a8_moe(**inputs), out)


def test_experts_of_two_ranks_add_up():
    """Each rank maps the other's ids to invalid ones; the scaling factor is left to the model."""
    inputs = make_inputs(m=9, **SIZES | {"topk": 4}) | {"routed_scaling_factor": 1.0}
    inputs["x"].nan_to_num_(1.0)
    inputs["topk_ids"][:] = torch.tensor([0, 1, 2, 3])
    whole, total = w4a8_moe(**inputs), torch.zeros(9, 512)
    for first, elsewhere in ((0, -1), (2, 2)):
        ids = inputs["topk_ids"] - first
        part = {n: inputs[n][first : first + 2] for n in ("w13", "w13_scale", "w2", "w2_scale")}
        ids = ids.masked_fill((ids < 0) | (ids > 1), elsewhere)
        total += w4a8_moe(**inputs | part | {"topk_ids": ids}).float()
    assert rel_frobenius(total.bfloat16(), whole, bound=5e-3) is None


def test_factor_multiplies_once():
    """A power of two is exact."""
    inputs = make_inputs(m=4, **SIZES) | {"routed_scaling_factor": 1.0}
    out = w4a8_moe(**inputs)
    assert out.any()
    assert torch.equal(w4a8_moe(**inputs | {"routed_scaling_factor": 4.0}), 4 * out)


@pytest.mark.parametrize("wrong", ["gate and up", "a1_scale", "a2_scale", "sign"])
def test_misread_argument_is_far_outside_the_bound(wrong):
    """make_inputs is adversarial: none of these passes the comparator's 1e-2."""
    inputs = make_inputs(m=16, **SIZES)
    changes = {
        "gate and up": {"w13": inputs["w13"].roll(256, dims=1)},
        "a1_scale": {"a1_scale": 4 * inputs["a1_scale"] / 448},
        "a2_scale": {"a2_scale": inputs["a2_scale"] / 16},
        "sign": {"w2_scale": inputs["w2_scale"].abs()},
    }
    assert rel_frobenius(w4a8_moe(**inputs | changes[wrong]), w4a8_moe(**inputs), bound=0.1)


def test_repacked_weights_give_the_bits_of_the_plain_ones():
    """Each of the two may be in either layout."""
    plain, repacked = make_inputs(m=9, **SIZES), make_inputs(m=9, **SIZES, is_repacked=True)
    assert repacked["w13"].shape == (4, 8, 4, 4224)
    expected = w4a8_moe(**plain)
    assert torch.equal(w4a8_moe(**repacked), expected)
    w2 = {name: plain[name] for name in ("w2", "w2_scale")}
    assert torch.equal(w4a8_moe(**repacked | w2), expected)


GOOD = make_inputs(m=3, **SIZES)
X, W2 = GOOD["x"], GOOD["w2"]
BAD = {
    "x dtype": ({"x": X.half()}, "x.dtype: found torch.float16, needed torch.bfloat16"),
    "k": ({"x": X[:, :192]}, r"x.shape\[1\]: found 192, needed a positive multiple of 128"),
    "ids": ({"topk_ids": GOOD["topk_ids"].long()}, "topk_ids.dtype: found torch.int64, needed"),
    "length": ({"topk_ids": GOOD["topk_ids"][:2]}, r"topk_ids.shape\[0\]: found 2, needed 3"),
    "weights": (
        {"topk_weights": GOOD["topk_weights"][:, :1]},
        r"topk_weights.shape: found \(3, 1\), needed \(3, 2\), as topk_ids",
    ),
    "w13 width": ({"w13": GOOD["w13"][..., :128]}, r"w13.shape: .* 256\]: two of 512 numbers"),
    "n": (
        {"w13": GOOD["w13"][:, :384], "w13_scale": GOOD["w13_scale"][..., : 4 * 384]},
        r"w13.shape\[1\]: found 384, needed 2n, n a multiple of 128",
    ),
    "w13_scale": ({"w13_scale": GOOD["w13_scale"][:2]}, r"w13_scale.shape: .* interleaved by 4"),
    "w2": (
        {"w2": W2[:, :256], "w2_scale": GOOD["w2_scale"][..., :256]},
        r"w2.shape: found \(4, 256, 128\), needed \(4, 512, 128\): experts of w13, width of x",
    ),
    "w2 width": ({"w2": W2[..., :64]}, r"w2.shape: .* needed .* 128\]: two of 256 numbers"),
    "a1_scale": ({"a1_scale": torch.ones(2)}, r"a1_scale.shape: found \(2,\), needed \(1,\), or"),
    "a2 dtype": ({"a2_scale": EMPTY.half()}, "a2_scale.dtype: found torch.float16, needed .*32"),
    "device": ({"w2": W2.to("meta")}, "w2.device: found meta, needed cpu, as x"),
    "scale device": ({"a1_scale": EMPTY.to("meta")}, "a1_scale.device: found meta, needed cpu"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_argument_is_refused_with_what_was_found_and_needed(change, message):
    """Nothing is cast, cut or copied to make a wrong call fit."""
    with pytest.raises(InputError, match=message):
        w4a8_moe(**GOOD | change)

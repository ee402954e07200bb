"""FP8BlockExperts and W4A8Experts: the checkpoint's parameters, stacked, and the ops under them."""

from __future__ import annotations

import copy
import io
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import hwfuse
import hwfuse.testing
from hwfuse.nn import FP8BlockExperts, W4A8Experts
from hwfuse.packing import unpack_int4

E, K, N = 4, 256, 128
# Two experts for each token; expert 2 gets none, 3 a single one, two routes belong to other ranks,
# and the last token has no route here at all.
IDS = torch.tensor([[0, 1], [3, 0], [1, -1], [E, 1], [-1, E + 7]])
WEIGHTS = torch.tensor([[0.5, 1.0], [2.0, 0.25], [1.0, 9.0], [9.0, -1.0], [9.0, 9.0]])


def numbers(*shape, seed=1):
    """Return random numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fp8_experts():
    """Build experts with random weights and scales that differ from block to block."""
    experts = FP8BlockExperts(E, K, N)
    for seed, (name, parameter) in enumerate(experts.named_parameters()):
        values = numbers(*parameter.shape, seed=seed)
        parameter.copy_(values.abs() * 0.05 + 0.01 if name.endswith("_scale_inv") else values)
    return experts


def w4a8_experts():
    """Build experts with random nibbles, signed scales, and one input scale that is the largest."""
    experts = W4A8Experts(E, K, N)
    for seed, (name, parameter) in enumerate(experts.named_parameters()):
        values = numbers(*parameter.shape, seed=seed)
        if name.endswith("_input_scale"):
            values = values.abs() * 0.01 + 0.005
        elif name.endswith("_scale_inv"):
            values = values * 0.02
        else:
            values = (values * 60).clamp(-128, 127)
        parameter.copy_(values)
    experts.prepare()
    return experts


def rounded(x, scale=None):
    """Quantise to fp8 and back, with a static scale or one for each 128 elements."""
    groups = x.float().unflatten(-1, (-1, 128))
    if scale is None:
        scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448
    codes = (groups * (1 / scale)).clamp(-448, 448).to(torch.float8_e4m3fn)
    return (codes.double() * scale).flatten(-2)


def weights_of(experts):
    """Dequantise all gates and ups, and all downs."""
    names, rows = ("gate_up_proj", "down_proj"), 128
    codes = [getattr(experts, name) for name in names]
    scales = [getattr(experts, f"{name}_scale_inv") for name in names]
    if codes[0].dtype == torch.int8:
        codes, rows = [unpack_int4(c) for c in codes], 1
        scales = [scale.bfloat16() for scale in scales]
    return [
        c.double() * s.double().repeat_interleave(rows, 1).repeat_interleave(128, 2)
        for c, s in zip(codes, scales, strict=True)
    ]


def simulated(experts, x, ids, weights):
    """Compute token by token, route by route, in float64."""
    gate_up, down = weights_of(experts)
    scales = (None, None)
    if isinstance(experts, W4A8Experts):
        scales = (
            max(experts.w1_input_scale.max(), experts.w3_input_scale.max()),
            experts.w2_input_scale.max(),
        )
    out = torch.zeros(x.shape, dtype=torch.float64)
    for t, e, weight in [
        (t, e, weights[t, j])
        for t, row in enumerate(ids.tolist())
        for j, e in enumerate(row)
        if 0 <= e < E
    ]:
        gate, up = (gate_up[e] @ rounded(x[t], scales[0])).bfloat16().float().chunk(2)
        out[t] += weight * (down[e] @ rounded(F.silu(gate) * up, scales[1]))
    return out


@pytest.mark.parametrize("build", [fp8_experts, w4a8_experts])
def test_result_when_routes_are_uneven_is_the_weighted_sum(build):
    """Experts without tokens and routes to other ranks count nothing; bfloat16 rounds the rest."""
    experts, x = build(), numbers(5, K).bfloat16()
    out = experts(x, IDS, WEIGHTS)
    expected = simulated(experts, x, IDS, WEIGHTS)
    assert (out.shape, out.dtype) == ((5, K), torch.bfloat16)
    assert not out[4].any()
    assert (out.double() - expected).norm() / expected.norm() < 5e-3


@pytest.mark.parametrize("build", [fp8_experts, w4a8_experts])
def test_result_when_there_are_no_tokens_is_empty(build):
    """A rank may get none."""
    out = build()(numbers(0, K).bfloat16(), IDS[:0], WEIGHTS[:0])
    assert out.shape == (0, K)


def test_fp8_experts_when_recorded_quantise_the_tokens_once():
    """Not once per expert; each hit expert multiplies twice."""
    with hwfuse.record() as record:
        fp8_experts()(numbers(5, K).bfloat16(), IDS, WEIGHTS)
    calls = {op: count for (op, _), count in record.calls.items()}
    assert calls["fp8_group_quant"] == calls["silu_mul_fp8_group_quant"] == 1
    assert calls["fp8_blockscale_gemm"] == 2 * 3


def test_w4a8_experts_when_compiled_are_one_node():
    """Fullgraph: the whole mixture is one op."""
    experts, x = w4a8_experts(), numbers(5, K).bfloat16()
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, IDS, WEIGHTS), experts(x, IDS, WEIGHTS))


def test_w4a8_experts_when_not_prepared_say_so():
    """The op's operands are made from the parameters, which an assignment does not announce."""
    with pytest.raises(hwfuse.InputError, match=r"w13_scale: found None, needed prepare\(\)"):
        W4A8Experts(E, K, N)(numbers(5, K).bfloat16(), IDS, WEIGHTS)


def test_w4a8_experts_when_a_state_dict_is_loaded_are_prepared_anew():
    """What was made from the parameters before is not kept, and not saved."""
    experts, other, x = w4a8_experts(), w4a8_experts(), numbers(5, K).bfloat16()
    state = experts.state_dict()
    assert set(state) == {name for name, _ in experts.named_parameters()}
    state = {name: t * 2 if name.endswith("_scale_inv") else t for name, t in state.items()}
    other.load_state_dict(state)
    assert torch.equal(other.w2_scale, experts.w2_scale * 2)
    assert not torch.equal(other(x, IDS, WEIGHTS), experts(x, IDS, WEIGHTS))


@pytest.fixture
def repacked(monkeypatch):
    """Experts whose weights are in the layout of Hopper's kernel, as if it ran here."""
    chosen = SimpleNamespace(chosen="cuda/cpp")
    experts = w4a8_experts()
    with monkeypatch.context() as patch:
        patch.setattr(hwfuse, "explain", lambda *_args, **_sizes: chosen)
        assert experts.repack()
    return experts


def test_w4a8_experts_when_repacked_compute_the_same(repacked):
    """The kernel that reads the layout is not here, so the reference does."""
    x = numbers(5, K).bfloat16()
    assert repacked.gate_up_proj.shape == (E, 2 * N // 64, K // 128, 4224)
    assert torch.equal(repacked(x, IDS, WEIGHTS), w4a8_experts()(x, IDS, WEIGHTS))


def test_w4a8_experts_when_repacked_save_and_load_the_checkpoint_s_layout(repacked):
    """A load or prepare() goes back to it."""
    plain, x = w4a8_experts(), numbers(5, K).bfloat16()
    for name, tensor in repacked.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[name])
    state = {
        name: -t if name == "down_proj_scale_inv" else t for name, t in plain.state_dict().items()
    }
    repacked.load_state_dict(state)
    assert repacked.down_proj.shape == plain.down_proj.shape
    assert torch.equal(repacked(x, IDS, WEIGHTS), -plain(x, IDS, WEIGHTS))


def test_w4a8_experts_when_no_kernel_reads_the_layout_keep_theirs():
    """On this machine's CPU nothing but the reference would take it."""
    experts = w4a8_experts()
    with hwfuse.testing.pretend("cuda:sm80"):
        assert not experts.repack()
    assert experts.gate_up_proj.ndim == 3


def saved(experts):
    """Take the way through a file."""
    file = io.BytesIO()
    torch.save(experts, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("build", [fp8_experts, w4a8_experts])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, saved])
def test_duplicate_when_made_computes_the_same(build, duplicate):
    """What is made from the parameters goes with them."""
    experts, x = build(), numbers(5, K).bfloat16()
    assert torch.equal(duplicate(experts)(x, IDS, WEIGHTS), experts(x, IDS, WEIGHTS))


@pytest.mark.parametrize("experts", [FP8BlockExperts, W4A8Experts])
@pytest.mark.parametrize(
    ("sizes", "message"),
    [((E, 192, 128), "hidden_size: found 192"), ((E, 128, 64), "intermediate_size: found 64")],
)
def test_experts_when_a_size_is_not_whole_blocks_name_it(experts, sizes, message):
    """The GEMMs contract both sizes in blocks of 128."""
    with pytest.raises(hwfuse.InputError, match=f"{message}, needed a positive multiple of 128"):
        experts(*sizes)

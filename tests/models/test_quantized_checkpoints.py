"""Quantised DeepSeek checkpoints, in their published layout, load and run through hwfuse on a CPU.

What is loaded is compared with a simulated model: the stock one, whose linears and experts multiply
dequantised weights by quantised and dequantised activations, with plain torch from the same file.
"""

from __future__ import annotations

import copy
import functools
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    FineGrainedFP8Config,
    GptOssConfig,
    GptOssForCausalLM,
)
from transformers.quantizers import auto

import hwfuse
from hwfuse.integrations import quantized
from hwfuse.integrations._tiny_deepseek import (
    tiny_deepseek_v3,
    write_fp8_checkpoint,
    write_w4afp8_checkpoint,
)
from hwfuse.nn import FP8BlockExperts, FP8BlockLinear, W4A8Experts

FP8, W4AFP8 = write_fp8_checkpoint, write_w4afp8_checkpoint
W4AFP8_LISTS = functools.partial(write_w4afp8_checkpoint, input_scale_shape=(1,))
KINDS = [FP8, W4AFP8, W4AFP8_LISTS]
KV = "model.layers.0.self_attn.kv_a_proj_with_mqa"
Q_B = "model.layers.1.self_attn.q_b_proj"
EXPERTS = "model.layers.1.mlp.experts"
NUM_EXPERTS = 4
IDS = torch.randint(3, 128, (4, 24), generator=torch.Generator().manual_seed(1))


@functools.cache
def stock():
    """Build the model that is quantised; nobody changes it."""
    return tiny_deepseek_v3(num_experts=NUM_EXPERTS)


@pytest.fixture(params=KINDS, ids=["fp8", "w4afp8", "w4afp8-lists"])
def kind(request):
    """A way to write the checkpoint; `lists`: each input scale stands in a list of one."""
    return request.param


@pytest.fixture
def folder(kind, tmp_path):
    """A checkpoint."""
    kind(stock(), tmp_path)
    return tmp_path


def load(folder, **options):
    """Load through hwfuse; transformers reports no key as missing, unexpected or mismatched."""
    with quantized.registered():
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, **options
        )
    assert not any(info.values()), info
    return model


def edit(folder, change):
    """Change the file's tensors, a dict, in place."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def declare(folder, *, quantization=(), **settings):
    """Change the config and the quantization_config in it."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | settings
    config.setdefault("quantization_config", {}).update(quantization)
    file.write_text(json.dumps(config))


def logits_of(model, ids=IDS):
    """Run one forward without gradients."""
    with torch.no_grad():
        return model(ids).logits.float()


def error(found, expected):
    """Return the median over tokens of the relative error of a token's logits."""
    return ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median().item()


def rounded(x, scale=None):
    """Quantise to fp8 and back, with a static scale or one for each 128 elements."""
    groups = x.float().unflatten(-1, (-1, 128))
    if scale is None:
        scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448
    codes = (groups * (1 / scale)).clamp(-448, 448).to(torch.float8_e4m3fn)
    return (codes.float() * scale).flatten(-2)


def fp8_weight(tensors, name, block=128):
    """Dequantise; *block*: rows that one row of the scale serves."""
    codes, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale_inv"]
    rows, columns = torch.arange(codes.shape[0]) // block, torch.arange(codes.shape[1]) // 128
    return codes.float() * scale[rows][:, columns]


def int4_weight(tensors, name):
    """Dequantise; the low nibble is the even column, scales are rounded to bfloat16."""
    packed = tensors[f"{name}.weight"].int() & 255
    nibbles = torch.stack([packed % 16, packed // 16], dim=-1).flatten(-2)
    scale = tensors[f"{name}.weight_scale_inv"].bfloat16().float()
    return torch.where(nibbles < 8, nibbles, nibbles - 16) * scale.repeat_interleave(128, dim=1)


class SimulatedLinear(nn.Module):
    """One linear of the file."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        """Multiply what fp8 leaves of both."""
        return (rounded(x) @ self.weight.T).to(x.dtype)


class SimulatedExperts(nn.Module):
    """The experts of the file, one after the other."""

    def __init__(self, tensors):
        super().__init__()
        is_int4 = tensors[f"{EXPERTS}.0.up_proj.weight"].dtype == torch.int8
        weight = int4_weight if is_int4 else fp8_weight
        self.weights = [
            [weight(tensors, f"{EXPERTS}.{e}.{name}_proj") for name in ("gate", "up", "down")]
            for e in range(NUM_EXPERTS)
        ]
        scales = {n: t.max() for n, t in sorted(tensors.items()) if n.endswith(".input_scale")}
        self.scale1 = max((s for n, s in scales.items() if ".w2." not in n), default=None)
        self.scale2 = max((s for n, s in scales.items() if ".w2." in n), default=None)

    def forward(self, x, topk_ids, topk_weights):
        """Sum the experts' results in float32."""
        out = torch.zeros(x.shape)
        for e, (gate, up, down) in enumerate(self.weights):
            x1 = rounded(x, self.scale1)
            g, u = (x1 @ gate.T).to(x.dtype).float(), (x1 @ up.T).to(x.dtype).float()
            y = (rounded(F.silu(g) * u, self.scale2) @ down.T).to(x.dtype).float()
            out += y * (topk_weights * (topk_ids == e)).sum(dim=1, keepdim=True)
        return out.to(x.dtype)


def simulated(folder, *, dtype=torch.bfloat16, block=128):
    """Build the simulated model of a checkpoint; *block* as for `fp8_weight`, of Q_B only."""
    tensors = load_file(folder / "model.safetensors")
    model = copy.deepcopy(stock())
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    for name in [name for name, _ in model.named_modules()]:
        if f"{name}.weight_scale_inv" in tensors:
            weight = fp8_weight(tensors, name, block if name == Q_B else 128)
            model.set_submodule(name, SimulatedLinear(weight))
        elif name == EXPERTS:
            model.set_submodule(name, SimulatedExperts(tensors))
    return model


def test_file_when_written_is_in_the_published_layout(tmp_path):
    """What a DeepSeek release's listing shows: 576 rows have 5 rows of scales."""
    W4AFP8(stock(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    expert = f"{EXPERTS}.3"
    for name, shape, dtype in (
        (f"{KV}.weight", [576, 256], torch.float8_e4m3fn),
        (f"{KV}.weight_scale_inv", [5, 2], torch.float32),
        (f"{Q_B}.weight", [192, 128], torch.float8_e4m3fn),
        (f"{Q_B}.weight_scale_inv", [2, 1], torch.float32),
        (f"{expert}.gate_proj.weight", [256, 128], torch.int8),
        (f"{expert}.gate_proj.weight_scale_inv", [256, 2], torch.float32),
        (f"{expert}.w1.input_scale", [], torch.float32),
        ("model.layers.1.mlp.gate.weight", [4, 256], torch.bfloat16),
        ("model.layers.1.mlp.gate.e_score_correction_bias", [4], torch.float32),
        ("lm_head.weight", [128, 256], torch.bfloat16),
    ):
        assert (list(tensors[name].shape), tensors[name].dtype) == (shape, dtype), name


def test_model_when_loaded_has_our_layers_for_all_linears_and_experts(folder, kind):
    """Only the head is left, which no checkpoint quantises; nothing takes a gradient in ours."""
    model = load(folder)
    experts = FP8BlockExperts if kind is FP8 else W4A8Experts
    assert type(model.get_submodule(EXPERTS)) is experts
    assert model.get_submodule(KV).weight_scale_inv.shape == (5, 2)
    linears = [m for name, m in model.named_modules() if name.endswith(("_proj", "_with_mqa"))]
    assert {type(linear) for linear in linears} == {FP8BlockLinear}
    assert len(linears) == 2 * 5 + 3 + 3
    assert type(model.lm_head) is nn.Linear
    ours = nn.ModuleList([*linears, model.get_submodule(EXPERTS)])
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def test_forward_when_recorded_runs_our_ops(folder, kind):
    """One product for each linear, and for the experts their own ops."""
    model = load(folder)
    with hwfuse.record() as record:
        logits_of(model)
    calls = {op: count for (op, _), count in record.calls.items()}
    if kind is FP8:
        assert calls["fp8_blockscale_gemm"] == 16 + 2 * NUM_EXPERTS
        assert calls["fp8_group_quant"] == 16 + 1
    else:
        assert calls["fp8_blockscale_gemm"] == calls["fp8_group_quant"] == 16
        assert calls["w4a8_moe"] == 1


def test_logits_when_compared_with_the_simulated_model_agree(folder, kind, capsys):
    """Most tokens have the very same logits: only sums in another order can differ."""
    found = logits_of(load(folder))
    median = error(found, logits_of(simulated(folder)))
    of_quantising = error(found, logits_of(stock()))
    name = "fp8" if kind is FP8 else "w4afp8"
    with capsys.disabled():
        print(f"\n{name}: median error {median:.1e}, of quantising {of_quantising:.1e}")  # noqa: T201 - wanted
    assert median < 1e-6
    assert of_quantising > 0.1


def test_tokens_when_generated_have_the_logits_of_the_simulated_model(folder):
    """8 greedy tokens, one at a time from the cache."""
    prompt = IDS[:, :6]
    out = load(folder).generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=8,
        min_new_tokens=8,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert out.sequences.shape == (4, 14)
    expected = logits_of(simulated(folder), out.sequences)[:, 5:13]
    assert error(torch.stack(out.logits, dim=1), expected) < 1e-6


def bits(tensors):
    """Return what can be compared; 5.17 takes lists of one number out of their list."""
    return {
        name: (t.dtype, t.squeeze().shape, t.flatten().view(torch.uint8).tolist())
        for name, t in tensors.items()
    }


def test_save_pretrained_when_loaded_writes_the_same_checkpoint(folder, tmp_path):
    """Names, types and bytes are those of the file that was loaded; it loads again."""
    model, again = load(folder), tmp_path / "again"
    model.save_pretrained(again)
    first, second = (load_file(f / "model.safetensors") for f in (folder, again))
    assert bits(second) == bits(first)
    assert torch.equal(logits_of(load(again)), logits_of(model))


def swap_nibbles(tensors):
    """Take the high nibble for the even column."""
    for tensor in tensors.values():
        if tensor.dtype == torch.int8:
            tensor.copy_((tensor << 4) | ((tensor >> 4) & 15))


def shift_scale_rows(tensors):
    """Read the scales of 576 rows from the second row on."""
    scale = tensors[f"{KV}.weight_scale_inv"]
    scale.copy_(scale.roll(-1, dims=0))


def grow_one_input_scale(tensors):
    """Calibrate one expert's activations ten times larger, which then holds for all."""
    tensors[f"{EXPERTS}.1.w3.input_scale"] *= 10


@pytest.mark.parametrize("change", [swap_nibbles, shift_scale_rows, grow_one_input_scale])
def test_logits_when_the_file_is_read_wrongly_differ(tmp_path, change):
    """Negative controls: the agreement above depends on each of these."""
    W4AFP8(stock(), tmp_path)
    expected = logits_of(simulated(tmp_path))
    edit(tmp_path, change)
    assert error(logits_of(load(tmp_path)), expected) > 1e-2


def test_logits_when_192_rows_are_taken_for_two_blocks_of_96_differ(tmp_path):
    """Negative control: the declared block counts, not rows / rows of scales."""
    FP8(stock(), tmp_path)
    assert error(logits_of(load(tmp_path)), logits_of(simulated(tmp_path, block=96))) > 1e-2


@pytest.mark.parametrize("smaller", ["w1", "w2"])
def test_input_scale_when_one_expert_has_a_smaller_one_does_not_matter(tmp_path, smaller):
    """The largest of all experts holds for all."""
    W4AFP8(stock(), tmp_path)
    expected = logits_of(load(tmp_path))
    edit(tmp_path, lambda t: t[f"{EXPERTS}.0.{smaller}.input_scale"].mul_(0.5))
    assert torch.equal(logits_of(load(tmp_path)), expected)


def drop(part):
    """Return an edit that takes out every tensor whose name contains *part*."""

    def change(tensors):
        for name in [name for name in tensors if part in name]:
            del tensors[name]

    return change


def shorten(part):
    """Return an edit that takes the last row of every tensor whose name contains *part*."""

    def change(tensors):
        tensors.update({n: t[:-1].clone() for n, t in tensors.items() if part in n})

    return change


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (FP8, drop(f"{KV}.weight_scale_inv"), f"{KV}.weight_scale_inv: missing in the checkpoint"),
        (FP8, drop(f"{KV}.weight"), f"{KV}.weight: missing in the checkpoint"),
        (
            FP8,
            shorten(f"{KV}.weight_scale_inv"),
            rf"{KV}.weight_scale_inv: found \[4, 2\], needed \[5, 2\]",
        ),
        (
            FP8,
            shorten("up_proj.weight_scale_inv"),
            r"mlp.up_proj.weight_scale_inv: found \[2, 2\], needed \[3, 2\]",
        ),
        (
            W4AFP8,
            drop("w1.input_scale"),
            f"{EXPERTS}.w1_input_scale: missing in the checkpoint",
        ),
        (
            W4AFP8,
            drop("0.w2.input_scale"),
            rf"{EXPERTS}.w2_input_scale: found \[3\], needed \[4\] or \[4, 1\]",
        ),
    ],
)
def test_load_when_a_tensor_is_missing_or_too_short_names_it(kind, change, message, tmp_path):
    """Left alone, transformers loads the rest, warns, and computes with what the memory holds."""
    kind(stock(), tmp_path)
    edit(tmp_path, change)
    with pytest.raises(hwfuse.IntegrationError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (FP8, {"weight_block_size": [64, 64]}, r"weight_block_size: found \[64, 64\], needed"),
        (
            FP8,
            {"activation_scheme": "static"},
            "activation_scheme: found 'static', needed 'dynamic'",
        ),
        (W4AFP8, {"group_size": 64}, "group_size: found 64, needed 128"),
        (W4AFP8, {"moe_activation_scheme": "dynamic"}, "moe_activation_scheme: found 'dynamic'"),
    ],
)
def test_load_when_the_config_asks_for_something_else_names_the_setting(
    kind, settings, message, tmp_path
):
    """A setting that the layers do not follow is refused, not ignored."""
    kind(stock(), tmp_path)
    declare(tmp_path, quantization=settings)
    with pytest.raises(hwfuse.IntegrationError, match=f"quantization_config.{message}"):
        load(tmp_path)


def test_load_when_a_width_is_not_whole_blocks_names_the_module(tmp_path):
    """The GEMM contracts blocks of 128."""
    FP8(stock(), tmp_path)
    declare(tmp_path, q_lora_rank=192)
    message = r"self_attn.q_b_proj \(Linear\): in_features: found 192, needed a positive multiple"
    with pytest.raises(hwfuse.IntegrationError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("kind", "dtype", "needed"),
    [
        (FP8, torch.float32, "torch.bfloat16 or torch.float16"),
        (W4AFP8, torch.float16, "torch.bfloat16$"),
    ],
)
def test_load_when_the_dtype_is_not_one_of_the_ops_says_which_are(kind, dtype, needed, tmp_path):
    """The results of the int4 experts overflow float16."""
    kind(stock(), tmp_path)
    with pytest.raises(hwfuse.InputError, match=f"^dtype: found {dtype}, needed {needed}"):
        load(tmp_path, dtype=dtype)


def test_load_when_experts_have_another_activation_says_so(tmp_path):
    """The ops behind the experts compute SiLU."""
    FP8(stock(), tmp_path)
    declare(tmp_path, hidden_act="gelu")
    with pytest.raises(hwfuse.IntegrationError, match=rf"{EXPERTS} .*act_fn: found GELU.*silu"):
        load(tmp_path)


def test_load_when_experts_lie_otherwise_says_so(tmp_path):
    """GPT-OSS has biases in its experts, which hwfuse's have not."""
    config = GptOssConfig(num_hidden_layers=1, hidden_size=128, num_local_experts=2, vocab_size=8)
    GptOssForCausalLM(config).save_pretrained(tmp_path)
    declare(tmp_path, dtype="bfloat16", quantization={"quant_method": "fp8"})
    with pytest.raises(hwfuse.IntegrationError, match=r"GptOssExperts\): has_bias: found True"):
        load(tmp_path)


def test_load_when_the_checkpoint_is_not_quantised_does_not_quantise(tmp_path):
    """Quantising while loading is transformers' own affair."""
    stock().save_pretrained(tmp_path)
    with pytest.raises(hwfuse.IntegrationError, match="only loads quantised ones"):
        load(tmp_path, quantization_config=FineGrainedFP8Config())


def test_load_when_the_config_leaves_modules_out_leaves_them(tmp_path):
    """As the checkpoint has them: here the head and one projection are in bfloat16."""
    FP8(stock(), tmp_path)
    declare(tmp_path, quantization={"modules_to_not_convert": ["lm_head", KV]})

    def dequantise(tensors):
        weight = stock().get_submodule(KV).weight.detach().clone()
        tensors.pop(f"{KV}.weight_scale_inv")
        tensors[f"{KV}.weight"] = weight

    edit(tmp_path, dequantise)
    model = load(tmp_path)
    assert type(model.get_submodule(KV)) is nn.Linear
    assert type(model.get_submodule(Q_B)) is FP8BlockLinear
    assert error(logits_of(model), logits_of(simulated(tmp_path))) < 1e-6


def test_scale_fmt_when_ue8m0_reaches_every_layer(tmp_path):
    """DeepSeek-V3.1 was made for activation scales that are powers of two."""
    FP8(stock(), tmp_path)
    expected = logits_of(load(tmp_path))
    declare(tmp_path, quantization={"scale_fmt": "ue8m0"})
    model = load(tmp_path)
    formats = {m.scale_format for m in model.modules() if hasattr(m, "scale_format")}
    assert formats == {"ue8m0"}
    assert not torch.equal(logits_of(model), expected)


def test_load_when_the_dtype_is_float16_computes_in_it(tmp_path):
    """The layers follow the model's dtype."""
    FP8(stock(), tmp_path)
    model = load(tmp_path, dtype=torch.float16)
    assert model(IDS).logits.dtype == torch.float16
    assert error(logits_of(model), logits_of(simulated(tmp_path, dtype=torch.float16))) < 1e-6


def test_load_when_scales_are_bfloat16_reads_them_exactly(tmp_path):
    """Releases differ in the type of their scales; all become float32."""
    FP8(stock(), tmp_path)

    def to_bfloat16(tensors):
        tensors.update({n: t.bfloat16() for n, t in tensors.items() if n.endswith("_scale_inv")})

    edit(tmp_path, to_bfloat16)
    model = load(tmp_path)
    dtypes = {p.dtype for n, p in model.named_parameters() if n.endswith("_scale_inv")}
    assert dtypes == {torch.float32}
    assert error(logits_of(model), logits_of(simulated(tmp_path))) < 1e-6


def test_register_when_undone_leaves_transformers_as_it_was():
    """Twice is once; a block inside a registration does not end it."""
    quantizers, configs = auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    before = dict(quantizers), dict(configs)
    quantized.register()
    quantized.register()
    with quantized.registered():
        pass
    assert quantizers["fp8"].__module__.startswith("hwfuse.")
    assert "w4afp8" in configs
    quantized.unregister()
    quantized.unregister()
    assert quantizers == before[0]
    assert configs == before[1]


def test_registered_when_loading_fails_is_undone():
    """An error in the block does not leave the registration behind."""
    with pytest.raises(OSError, match="nowhere"), quantized.registered():
        AutoModelForCausalLM.from_pretrained("/nowhere")
    assert "w4afp8" not in auto.AUTO_QUANTIZER_MAPPING

"""A tiny DeepSeek-V3 and its quantised checkpoints as they are published, for tests and demo."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hwfuse.packing import pack_int4

BLOCK = 128


def tiny_deepseek_v3(*, seed: int = 0, num_experts: int = 4) -> Any:
    """Build a DeepseekV3ForCausalLM in bfloat16: a dense layer and one with experts.

    Its ``kv_a_proj_with_mqa`` has 576 rows, as the real one: four blocks of 128 and a half.
    ``q_b_proj`` has 192.  Every token goes to every expert, so rounding cannot change a route.
    The same seed gives the same weights.
    """
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        vocab_size=128,
        hidden_size=256,
        intermediate_size=384,
        moe_intermediate_size=256,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        q_lora_rank=128,
        kv_lora_rank=512,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
        v_head_dim=64,
        n_routed_experts=num_experts,
        num_experts_per_tok=num_experts,
        n_group=1,
        topk_group=1,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DeepseekV3ForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
                else:  # the initialiser's 0.02 leaves logits near zero and all blocks alike
                    parameter.mul_(torch.linspace(1.0, 6.0, parameter.shape[-2]).unsqueeze(1))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "e_score_correction_bias" not in name and "inv_freq" not in name:  # stay in float32
            tensor.data = tensor.to(torch.bfloat16)
    return model.eval()


def write_fp8_checkpoint(model: Any, folder: Path) -> None:
    """Save *model* as DeepSeek publishes it: fp8 weights, and a scale for each 128x128 block."""
    settings = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
    }
    _write(model, folder, settings, _fp8_tensors)


def write_w4afp8_checkpoint(
    model: Any, folder: Path, *, input_scale_shape: tuple[int, ...] = ()
) -> None:
    """Save *model* as W4AFP8: as above, but the experts in int4 with static activation scales."""

    def quantised(name: str, weight: Tensor) -> dict[str, Tensor]:
        expert, _, projection = name.removesuffix(".weight").rpartition(".")
        if ".experts." not in name:
            return _fp8_tensors(name, weight)
        w = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}[projection]
        value = 0.01 + 0.001 * int(w[1]) * int(expert.rpartition(".")[2])
        input_scale = torch.full(input_scale_shape, value)
        return {f"{expert}.{w}.input_scale": input_scale, **_int4_tensors(name, weight)}

    _write(model, folder, {"quant_method": "w4afp8"}, quantised)


def _write(
    model: Any,
    folder: Path,
    settings: dict[str, Any],
    quantised: Callable[[str, Tensor], dict[str, Tensor]],
) -> None:
    """Save under the published names, then quantise every projection in the file."""
    from safetensors.torch import load_file, save_file

    model.save_pretrained(folder)
    file, config_file = folder / "model.safetensors", folder / "config.json"
    tensors = {}
    for name, tensor in load_file(file).items():
        tensors.update(quantised(name, tensor) if "_proj" in name else {name: tensor})
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(config | {"quantization_config": settings}, indent=2))


def _fp8_tensors(name: str, weight: Tensor) -> dict[str, Tensor]:
    n, k = weight.shape
    num_rows, num_columns = -(-n // BLOCK), -(-k // BLOCK)
    padded = torch.zeros(num_rows * BLOCK, num_columns * BLOCK)
    padded[:n, :k] = weight
    blocks = padded.view(num_rows, BLOCK, num_columns, BLOCK)
    scale = blocks.abs().amax(dim=(1, 3)) / torch.finfo(torch.float8_e4m3fn).max
    codes = (blocks / scale[:, None, :, None]).reshape(padded.shape)[:n, :k]
    return {name: codes.to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}


def _int4_tensors(name: str, weight: Tensor) -> dict[str, Tensor]:
    groups = weight.float().unflatten(1, (-1, BLOCK))
    scale = groups.abs().amax(dim=2) / 7
    codes = (groups / scale.unsqueeze(2)).round().to(torch.int8)
    return {name: pack_int4(codes.flatten(1)), f"{name}_scale_inv": scale}

"""Tiny models with random weights: real model code without a download, for tests and demo.

The same seed gives the same weights.  Norm weights, decays and time steps get random values:
transformers starts them at constants, under which swapped heads would not show.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Caches need a layer of attention; Kimi Linear's default pattern has none among its first.
_THREE_LAYERS = {
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
}
_MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}


def tiny_qwen3_next(
    *, seed: int = 0, dtype: torch.dtype = torch.float32, num_v_heads: int = 4
) -> Any:
    """Build a Qwen3NextForCausalLM of four layers, three of them gated delta nets.

    Args:
        seed: of the weights.
        dtype: of all parameters.
        num_v_heads: value heads; the model has 2 key heads, so 4 means two for each.
    """
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    config = Qwen3NextConfig(
        **_SIZES, **_MOE, **_gdn(num_v_heads), num_hidden_layers=4, head_dim=16
    )
    return _built(lambda: Qwen3NextForCausalLM(config), seed, dtype)


def tiny_qwen3_5(*, seed: int = 0, dtype: torch.dtype = torch.float32, num_v_heads: int = 4) -> Any:
    """Build a Qwen3_5ForCausalLM of three layers, two of them gated delta nets.

    Arguments as for `tiny_qwen3_next`.
    """
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    config = Qwen3_5TextConfig(**_SIZES, **_gdn(num_v_heads), **_THREE_LAYERS, head_dim=16)
    return _built(lambda: Qwen3_5ForCausalLM(config), seed, dtype)


def tiny_qwen3_5_moe(
    *, seed: int = 0, dtype: torch.dtype = torch.float32, num_v_heads: int = 4
) -> Any:
    """Build a Qwen3_5MoeForCausalLM; as `tiny_qwen3_5`, with experts."""
    from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

    config = Qwen3_5MoeTextConfig(
        **_SIZES, **_MOE, **_gdn(num_v_heads), **_THREE_LAYERS, head_dim=16
    )
    return _built(lambda: Qwen3_5MoeForCausalLM(config), seed, dtype)


def tiny_gemma4(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Build a Gemma4ForCausalLM with layers of all three modes.

    Layer 0 slides, over q, k and v; layer 1 attends to everything, with k = v; layers 2 and 3 use
    their keys and values.
    """
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    config = Gemma4TextConfig(
        **_SIZES | {"num_key_value_heads": 4},
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        head_dim=16,
        global_head_dim=32,  # of full attention, whatever head_dim says
        num_global_key_value_heads=2,
        attention_k_eq_v=True,
        num_kv_shared_layers=2,
        sliding_window=8,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=128,
    )
    return _built(lambda: Gemma4ForCausalLM(config), seed, dtype)


def tiny_kimi_linear(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Build a KimiLinearForCausalLM of three layers, two of them Kimi delta attention."""
    from transformers import KimiLinearConfig, KimiLinearForCausalLM

    config = KimiLinearConfig(
        **_SIZES | _THREE_LAYERS | {"num_key_value_heads": 4},
        num_local_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        linear_num_heads=4,
        linear_head_dim=16,
    )
    return _built(lambda: KimiLinearForCausalLM(config), seed, dtype)


def _gdn(num_v_heads: int) -> dict[str, int]:
    return {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": num_v_heads,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 16,
    }


def _built(build: Callable[[], Any], seed: int, dtype: torch.dtype) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1 or name.endswith("A_log"):
                    parameter.add_(torch.randn_like(parameter) * 0.3)
                elif "conv1d" not in name:
                    parameter.mul_(4.0)  # 0.02 of the initialiser leaves logits near zero
    return model.to(dtype).eval()

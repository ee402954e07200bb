"""A tiny Qwen3-Next with random weights: real model code without a download, for tests and demo."""

from __future__ import annotations

from typing import Any

import torch


def tiny_qwen3_next(
    *, seed: int = 0, dtype: torch.dtype = torch.float32, num_v_heads: int = 4
) -> Any:
    """Build a Qwen3NextForCausalLM of four layers, three of them gated delta nets.

    The same seed gives the same weights.  Norm weights, decay and time step get random values:
    transformers starts them at constants, under which swapped heads would not show.

    Args:
        seed: of the weights.
        dtype: of all parameters.
        num_v_heads: value heads; the model has 2 key heads, so 4 means two for each.
    """
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    config = Qwen3NextConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=num_v_heads,
        linear_key_head_dim=8,
        linear_value_head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3NextForCausalLM(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
                elif "conv1d" not in name:
                    parameter.mul_(4.0)  # 0.02 of the initialiser leaves logits near zero
    return model.to(dtype).eval()

"""Qwen3-Next: `fused_qkvzba` splits the two input projections of its gated delta net.

The logits stay bit for bit the same.  Exception: with one value head per key head (no released
model) the stock code hands strided views on, for which torch's float32 sigmoid and silu differ in
the last bit on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import hwfuse
from hwfuse.integrations._rewrite import Edit, Rule, Use

# The two linears stay the model's own, with their hooks, adapters, quantised weights and TP plans.
STOCK = """
projected_states_qkvz = self.in_proj_qkvz(hidden_states)
projected_states_ba = self.in_proj_ba(hidden_states)
query, key, value, z, b, a = self.fix_query_key_value_ordering(
    projected_states_qkvz, projected_states_ba
)
query, key, value = (x.reshape(x.shape[0], x.shape[1], -1) for x in (query, key, value))
mixed_qkv = torch.cat((query, key, value), dim=-1)
"""

FUSED = """
projected_states_qkvz = self.in_proj_qkvz(hidden_states)
projected_states_ba = self.in_proj_ba(hidden_states)
mixed_qkv, z, b, a = self.hwfuse_split(projected_states_qkvz, projected_states_ba)
"""


def hwfuse_split(self: Any, qkvz: Tensor, ba: Tensor) -> list[Tensor]:
    """Split projections ``[batch, tokens, width]``; the op's rows are batch and tokens together."""
    batch_and_tokens = qkvz.shape[:-1]
    split = hwfuse.op("fused_qkvzba")(
        qkvz.flatten(0, -2),
        ba.flatten(0, -2),
        head_k_dim=self.head_k_dim,
        head_v_dim=self.head_v_dim,
    )
    return [part.unflatten(0, batch_and_tokens) for part in split]


def _objection(module: Any) -> str | None:
    """Check the method that the edit leaves out: it must still mean the interleaved layout.

    `forward` shows only its call.  So it is run on column numbers, which say where each output
    comes from.
    """
    heads, ratio = module.num_k_heads, module.num_v_heads // module.num_k_heads
    widths = [module.head_k_dim] * 2 + [ratio * module.head_v_dim] * 2
    qkvz = torch.arange(heads * sum(widths), device="cpu").view(1, 1, -1)
    ba = torch.arange(heads * 2 * ratio, device="cpu").view(1, 1, -1)
    expected = (
        *torch.split(qkvz.view(heads, -1), widths, dim=1),
        *torch.split(ba.view(heads, -1), ratio, dim=1),
    )
    found = module.fix_query_key_value_ordering(qkvz, ba)
    for name, part, columns in zip("qkvzba", found, expected, strict=True):
        if not torch.equal(part.flatten(), columns.flatten()):
            return f"fix_query_key_value_ordering takes {name} from other columns than the op"
    return None


def _use(module: Any, _pack: str) -> Use:
    sizes = {
        "num_k_heads": module.num_k_heads,
        "num_v_heads": module.num_v_heads,
        "head_k_dim": module.head_k_dim,
        "head_v_dim": module.head_v_dim,
        "dtype": module.conv1d.weight.dtype,
    }
    return Use("the model's own linears, then one copy", (("fused_qkvzba", sizes),))


RULE = Rule(
    name="qwen3-next",
    version=1,
    classes=("Qwen3NextGatedDeltaNet",),
    ops=("fused_qkvzba",),
    edits=(Edit(STOCK, FUSED),),
    methods=(hwfuse_split,),
    use=_use,
    objection=_objection,
)

"""Kimi Linear: the eight input projections of its delta attention as `fused_qkvbfg`.

One GEMM and one batched GEMM instead of eight.  They may add up in another order, so logits agree
to rounding and not bit for bit.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import hwfuse
from hwfuse import packing
from hwfuse.integrations import _view_packing
from hwfuse.integrations._rewrite import Edit, Rule, Tail, Use

PROJECTIONS = """
mixed_qkv = torch.cat(
    [
        self.q_proj(hidden_states),
        self.k_proj(hidden_states),
        self.v_proj(hidden_states),
    ],
    dim=-1,
).transpose(1, 2)
"""

FUSED_PROJECTIONS = """
mixed_qkv, b, forget_gate, gate = self.hwfuse_project(hidden_states)
mixed_qkv = mixed_qkv.transpose(1, 2)
"""

GATES = """
g = self.forget_gate(hidden_states)
beta = torch.sigmoid(self.b_proj(hidden_states))
"""

FUSED_GATES = """
g = forget_gate
beta = torch.sigmoid(b)
"""

OUTPUT_GATE = """
gate = self.g_b_proj(self.g_a_proj(hidden_states)).view(hidden_shape)
"""

FUSED_OUTPUT_GATE = """
gate = gate.view(hidden_shape)
"""

# The rest of the forget gate stays the model's own code; None: it must not read the input again.
FORGET_GATE = """
hidden_shape = (*hidden_states.shape[:2], -1, self.head_dim)
forget_gate = self.f_b_proj(self.f_a_proj(hidden_states))
"""

FORGET_GATE_TAIL = """
forget_gate, hidden_states = hidden_states, None
hidden_shape = (*forget_gate.shape[:2], -1, self.head_dim)
"""


def hwfuse_project(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q|k|v, beta's logits, the forget gate and the output gate before its sigmoid."""
    weights = _view_packing.packed_weights(self, packs(self), hidden_states)
    if weights is None or _view_packing.interception(self.forget_gate):
        q, k, v = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        return (
            torch.cat([q, k, v], dim=-1),
            self.b_proj(hidden_states),
            self.forget_gate(hidden_states),
            self.g_b_proj(self.g_a_proj(hidden_states)),
        )
    w_qkvbfg, w_fg = weights
    qkvbfg, gates = hwfuse.op("fused_qkvbfg")(
        hidden_states.flatten(0, -2), w_qkvbfg, w_fg.unflatten(0, (2, -1))
    )
    mixed_qkv, b, _ = packing.split_qkvbfg(qkvbfg, head_dim=self.head_dim)
    if qkvbfg.shape[-1] % 8:  # causal_conv1d takes no such rows; the stock code copies, too
        mixed_qkv = mixed_qkv.contiguous()
    forget, output = gates
    mixed_qkv, b, forget, output = (
        part.unflatten(0, hidden_states.shape[:-1]) for part in (mixed_qkv, b, forget, output)
    )
    return mixed_qkv, b, self.hwfuse_forget_gate(self.forget_gate, forget), output


def packs(module: Any) -> dict[str, Sequence[nn.Linear]]:
    """Return the eight projections in the order of `pack_kda`."""
    gate = module.forget_gate
    by_hidden = (module.q_proj, module.k_proj, module.v_proj, module.b_proj)
    low_ranks = (gate.f_a_proj, module.g_a_proj)
    return {
        "hwfuse_w_qkvbfg": (*by_hidden, *low_ranks),
        "hwfuse_w_fg": (gate.f_b_proj, module.g_b_proj),
    }


def _objection(module: Any) -> str | None:
    """Check that the gate's own code is the one whose text was edited."""
    owner = inspect.unwrap(type(module).forward).__globals__[RULE.tails[0].owner]
    if type(module.forget_gate).forward is not owner.forward:
        return f"forget_gate is a {type(module.forget_gate).__name__} with another forward"
    return None


def _use(module: Any, _pack: str) -> Use:
    if found := _view_packing.interception(module.forget_gate):
        return Use(f"its own linears: forget_gate has {found}")
    sizes = {
        "hidden_size": module.hidden_size,
        "num_heads": module.num_heads,
        "head_dim": module.head_dim,
        "dtype": module.q_proj.weight.dtype,
    }
    mode = "one GEMM and one batched GEMM instead of eight; q|k|v are a view, no copy"
    return Use(mode, (("fused_qkvbfg", sizes),))


RULE = Rule(
    name="kimi-linear",
    version=1,
    classes=("KimiLinearDeltaAttention",),
    ops=("fused_qkvbfg",),
    edits=(
        Edit(PROJECTIONS, FUSED_PROJECTIONS),
        Edit(GATES, FUSED_GATES),
        Edit(OUTPUT_GATE, FUSED_OUTPUT_GATE),
    ),
    methods=(hwfuse_project, *_view_packing.METHODS),
    use=_use,
    tails=(
        Tail("hwfuse_forget_gate", "KimiLinearForgetGate", Edit(FORGET_GATE, FORGET_GATE_TAIL)),
    ),
    objection=_objection,
    packs=packs,
    needs_packs=True,
)

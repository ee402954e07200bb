"""Kimi Linear: eight projections in one op, the forget gate's tail, and when they stay apart."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from hwfuse import packing
from hwfuse.integrations import _kimi_linear
from hwfuse.integrations._rewrite import SourceChanged
from hwfuse.integrations.transformers import patch, supported, unpatch

EIGHT = (
    "q_proj",
    "k_proj",
    "v_proj",
    "b_proj",
    "forget_gate.f_a_proj",
    "g_a_proj",
    "forget_gate.f_b_proj",
    "g_b_proj",
)
pytestmark = pytest.mark.parametrize("family", ["kimi_linear"], indirect=True)


def difference(one, other):
    """Return by how much logits differ at most."""
    return (one - other).abs().max().item()


def test_report_when_patched_names_the_gemms(model):
    """One op with two GEMMs, and what is not copied."""
    assert (
        "  KimiLinearDeltaAttention, 2 modules, rule kimi-linear v1, calls fused_qkvbfg: "
        "one GEMM and one batched GEMM instead of eight; q|k|v are a view, no copy"
    ) in str(patch(model)).splitlines()


def test_packed_weights_when_patched_are_what_packing_makes_of_the_checkpoint(stock, model):
    """The rows are those of `pack_kda`."""
    patch(model)
    attention = stock().model.layers[0].self_attn
    names = {name.removeprefix("forget_gate."): p for name, p in attention.named_parameters()}
    expected = packing.pack_kda(names)
    patched = model.model.layers[0].self_attn
    assert torch.equal(patched.hwfuse_w_qkvbfg.weight, expected["w_qkvbfg"])
    assert torch.equal(patched.hwfuse_w_fg.weight, expected["w_fg"].flatten(0, 1))


class _Doubled(nn.Linear):
    """Stands for an adapter or a quantised linear."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("name", EIGHT)
def test_projections_when_one_of_eight_is_replaced_stay_apart(
    stock, model, logits_of, calls_in, name
):
    """Each of the eight is looked at in each call: the other layer is still fused."""
    patch(model)
    model.model.layers[0].self_attn.get_submodule(name).__class__ = _Doubled
    assert calls_in(model) == {"fused_qkvbfg": 1}
    found = logits_of(model)
    unpatch(model)
    assert difference(found, logits_of(model)) < 1e-5
    assert difference(found, logits_of(stock())) > 1e-3


def test_report_when_one_was_replaced_later_says_so(model):
    """What a patched module does now can differ from what it did when it was patched."""
    patch(model)
    model.model.layers[0].self_attn.b_proj.__class__ = _Doubled
    modes = {entry.mode: entry.modules for entry in supported(model).already}
    assert modes["its own linears: one of its linears is a _Doubled"] == 1


def test_forget_gate_when_hooked_is_called(stock, model, logits_of, shapes_out):
    """A hook on the module whose tail is used runs."""
    patch(model)
    seen = shapes_out(model.model.layers[0].self_attn.forget_gate)
    assert difference(logits_of(model), logits_of(stock())) < 1e-5
    assert seen == [(2, 12, 4, 16)]
    assert "its own linears: forget_gate has a forward hook" in str(supported(model))


def test_patch_when_the_gate_has_another_forward_is_an_error(model):
    """The tail is made from the text of one class; a subclass with its own needs another."""
    gate = model.model.layers[0].self_attn.forget_gate
    gate.__class__ = type("Other", (type(gate),), {"forward": lambda _self, x: x})
    with pytest.raises(SourceChanged, match="forget_gate is a Other with another forward"):
        patch(model)


def test_patch_when_the_text_of_the_gate_changed_is_an_error(model, monkeypatch):
    """The text of the gate's class is looked at like that of the attention."""
    gate = type(model.model.layers[0].self_attn.forget_gate)

    def forward(self, hidden_states):
        return self.f_b_proj(self.f_a_proj(hidden_states))

    monkeypatch.setattr(gate, "forward", forward)
    with pytest.raises(SourceChanged, match=r"KimiLinearForgetGate.forward .*\n(.*\n)*.*-forget_"):
        patch(model)


def swapped(**others):
    """Return `packs` with projections exchanged."""

    def packs(module):
        named = {name: module.get_submodule(others.get(name, name)) for name in EIGHT}
        linears = list(named.values())
        return {"hwfuse_w_qkvbfg": linears[:6], "hwfuse_w_fg": linears[6:]}

    return packs


F_A_AND_G_A = {"forget_gate.f_a_proj": "g_a_proj", "g_a_proj": "forget_gate.f_a_proj"}
F_B_AND_G_B = {"forget_gate.f_b_proj": "g_b_proj", "g_b_proj": "forget_gate.f_b_proj"}
WRONG = {
    "f and g": F_A_AND_G_A | F_B_AND_G_B,
    "f_a and g_a": F_A_AND_G_A,
    "f_b and g_b": F_B_AND_G_B,
    "k and v": {"k_proj": "v_proj", "v_proj": "k_proj"},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_tokens_when_projections_are_swapped_differ(
    stock, model, logits_of, tokens_of, only_rule, monkeypatch, wrong
):
    """Negative control: the model is sensitive to what the equality tests claim."""
    packs = swapped(**WRONG[wrong])
    monkeypatch.setattr(_kimi_linear, "packs", packs)
    only_rule(dataclasses.replace(_kimi_linear.RULE, name=wrong, packs=packs))
    patch(model)
    assert difference(logits_of(model), logits_of(stock())) > 0.1
    assert not torch.equal(tokens_of(model), tokens_of(stock()))

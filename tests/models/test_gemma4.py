"""Gemma4: three modes, head counts from the projections, norms that must stay the op's."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from hwfuse import packing
from hwfuse.integrations import _gemma4
from hwfuse.integrations._rewrite import SourceChanged
from hwfuse.integrations.transformers import patch, supported

pytestmark = pytest.mark.parametrize("family", ["gemma4"], indirect=True)


def difference(one, other):
    """Return by how much logits differ at most."""
    return (one - other).abs().max().item()


def test_report_when_patched_names_the_mode_of_each_layer(model):
    """q, k and v; q and k = v behind a projection without v; q alone."""
    assert [(entry.modules, entry.ops, entry.mode) for entry in patch(model).patched] == [
        (1, ("qkv_rms_norm",), "norms of q, k and v; one GEMM instead of 3"),
        (1, ("q_keqv_rms_norm",), "norms of q and k = v; one GEMM instead of 2"),
        (2, ("q_rms_norm",), "norm of q; k and v are another layer's; the model's own linears"),
    ]


def test_report_when_packing_is_off_says_the_linears_are_the_model_s(model):
    """The norms are fused all the same."""
    modes = [entry.mode for entry in patch(model, pack="never").patched]
    assert all(mode.endswith("; the model's own linears") for mode in modes)


@pytest.mark.parametrize(
    ("layer", "mode"), [(0, packing.QKVNormMode.QKV), (1, packing.QKVNormMode.Q_KEQV)]
)
def test_packed_weight_when_patched_is_what_packing_makes_of_the_checkpoint(
    stock, model, layer, mode
):
    """The rows are those of `pack_gemma4`: with k = v the projection has no rows for v."""
    patch(model)
    attention = model.model.layers[layer].self_attn
    checkpoint = dict(stock().model.layers[layer].self_attn.named_parameters())
    expected = packing.pack_gemma4(checkpoint, mode, head_dim=attention.head_dim)
    assert torch.equal(attention.hwfuse_qkv.weight, expected["qkv_proj.weight"])


def test_outputs_when_a_rank_has_half_the_heads_are_those_of_the_stock_model(
    stock, model, logits_of
):
    """Head counts follow from the projections, as under tensor parallelism."""
    for attention in (layer.self_attn for layer in model.model.layers):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            linear = getattr(attention, name, None)
            if linear is not None:
                half = linear.weight.detach().chunk(2, dim=1 if name == "o_proj" else 0)[0]
                linear.weight = nn.Parameter(half.clone())
                linear.out_features, linear.in_features = half.shape
    before = logits_of(model)
    patch(model, pack="never")
    assert torch.equal(logits_of(model), before)
    assert difference(before, logits_of(stock())) > 0.1


def test_norms_when_tensor_parallelism_wrapped_them_are_still_the_op(model, calls_in):
    """It puts around these weights what adds gradients up, which is nothing without gradients."""
    from transformers.distributed.tensor_parallel import ReplicatedWithGradAllReduce

    for layer in model.model.layers[:2]:
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
            ReplicatedWithGradAllReduce().install_forward(norm, None)
    patch(model)
    assert calls_in(model) == {"qkv_rms_norm": 1, "q_keqv_rms_norm": 1, "q_rms_norm": 2}
    with torch.enable_grad():
        attention = model.model.layers[0].self_attn
        assert not _gemma4._is_own_code(attention, attention.q_norm)


@pytest.mark.parametrize("layer", [0, 1], ids=["q, k, v", "q, k = v"])
def test_norms_when_one_is_hooked_are_called_one_by_one(
    stock, model, logits_of, calls_in, shapes_out, layer
):
    """A hook on a norm runs, and the numbers stay."""
    patch(model)
    seen = shapes_out(model.model.layers[layer].self_attn.v_norm)
    assert difference(logits_of(model), logits_of(stock())) < 1e-5
    assert seen == [(2, 12, 4, 16) if layer == 0 else (2, 12, 2, 32)]
    assert sum(calls_in(model).values()) == 3
    assert "calls no op: the model's own norms, as one is hooked or replaced; " in str(
        supported(model)
    )


def one_plus_weight(self, hidden_states):
    """Weigh as Gemma3 does."""
    return self._norm(hidden_states.float()).type_as(hidden_states) * (1 + self.weight.float())


def other_eps(norm):
    """Change what is added to the mean square."""
    norm.eps = 1e-5


def other_formula(norm):
    """Change the class, as a release could."""
    norm.__class__ = type("Changed", (type(norm),), {"forward": one_plus_weight})


@pytest.mark.parametrize("change", [other_eps, other_formula])
def test_patch_when_a_norm_computes_something_else_is_an_error(model, change):
    """`forward` only calls the norms, so their formula is tried out."""
    change(model.model.layers[1].self_attn.k_norm)
    with pytest.raises(SourceChanged, match="computes other norms than the op"):
        patch(model)


def swapped_k_and_v(self, query, key, value):
    """Mistake keys for values."""
    return query, value, key


def value_from_the_weighted_key(self, query, key, value):
    """Take v, where k = v, after k's weight."""
    return query, key, key if self.k_norm is not None and self.v_proj is None else value


def raw_query(self, query, key, value):
    """Leave the weight of q out."""
    return query / self.q_norm.weight, key, value


@pytest.mark.parametrize("wrong", [swapped_k_and_v, value_from_the_weighted_key, raw_query])
def test_tokens_when_the_norms_are_wrong_differ(
    stock, model, logits_of, tokens_of, only_rule, wrong
):
    """Negative control: the model is sensitive to what the equality tests claim."""

    def hwfuse_project_and_norm(self, hidden_states):
        heads = _gemma4.hwfuse_project_and_norm(self, hidden_states)
        return heads if self.is_kv_shared_layer else wrong(self, *heads)

    methods = (hwfuse_project_and_norm, *_gemma4.RULE.methods[1:])
    only_rule(dataclasses.replace(_gemma4.RULE, name=wrong.__name__, methods=methods))
    patch(model)
    assert difference(logits_of(model), logits_of(stock())) > 0.1
    assert not torch.equal(tokens_of(model), tokens_of(stock()))

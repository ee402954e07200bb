"""Qwen3.5: views or dense rows, which of them the report says, and what wrong ones would do."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn

import hwfuse
from hwfuse import packing
from hwfuse.integrations import _qwen3_5
from hwfuse.integrations.transformers import patch, supported

LAYERS = 2  # gated delta nets in the tiny model
qwen3_5 = pytest.mark.parametrize("family", ["qwen3_5"], indirect=True)
qwen3_5_dense = pytest.mark.parametrize("family", ["qwen3_5_dense"], indirect=True)


def difference(one, other):
    """Return by how much logits differ at most."""
    return (one - other).abs().max().item()


@qwen3_5
def test_split_when_nothing_needs_dense_rows_is_views_of_one_gemm(model):
    """All four lie in one buffer of the GEMM's rows, in the order q|k|v, z, b, a."""
    patch(model)
    layer = model.model.layers[0].linear_attn
    hidden = torch.randn(2, 3, 32)
    with torch.no_grad():
        mixed_qkv, z, b, a = layer.hwfuse_project(hidden)
    width = 2 * 2 * 8 + 2 * 4 * 16 + 2 * 4
    assert {t.untyped_storage().data_ptr() for t in (z, b, a)} == {
        mixed_qkv.untyped_storage().data_ptr()
    }
    assert [t.storage_offset() for t in (mixed_qkv, z, b, a)] == [0, 96, 160, 164]
    assert mixed_qkv.stride() == (3 * width, width, 1)
    assert z.shape == (2, 3, 4, 16)


@qwen3_5
def test_packed_weight_when_patched_is_what_packing_makes_of_the_checkpoint(stock, model):
    """The rows are the contiguous layout of `pack_gdn`, b and a last."""
    patch(model)
    checkpoint = dict(stock().model.layers[0].linear_attn.named_parameters())
    layer = model.model.layers[0].linear_attn
    expected = packing.pack_gdn(checkpoint, head_k_dim=8, head_v_dim=16, layout="contiguous")
    assert torch.equal(
        layer.hwfuse_qkvzba.weight,
        torch.cat([expected["in_proj_qkvz.weight"], expected["in_proj_ba.weight"]]),
    )


@qwen3_5
def test_report_when_views_are_enough_says_so(model):
    """No op is called, so the report says what was done instead."""
    assert (
        "  Qwen3_5GatedDeltaNet, 2 modules, rule qwen3.5 v1, calls no op: "
        "one GEMM instead of four; views of its rows, no copy"
    ) in str(patch(model)).splitlines()


@qwen3_5_dense
def test_split_when_a_consumer_needs_dense_rows_is_the_op(stock, model, logits_of, calls_in):
    """causal_conv1d takes strided rows only if they start at multiples of 8 elements."""
    assert (
        "calls fused_qkvzba: one GEMM instead of four; one copy, for the convolution, "
        "which takes rows of 8 * n elements, not of 100"
    ) in str(patch(model))
    assert calls_in(model) == {"fused_qkvzba": LAYERS}
    assert difference(logits_of(model), logits_of(stock())) < 1e-5


@qwen3_5_dense
def test_split_when_views_are_asked_for_is_views(stock, model, logits_of, calls_in):
    """`pack="view"` overrides the look at the consumers."""
    patch(model, pack="view")
    assert calls_in(model) == {}
    assert difference(logits_of(model), logits_of(stock())) < 1e-5


@qwen3_5
def test_split_when_the_norm_is_another_library_s_is_the_op(stock, model, logits_of, calls_in):
    """Such a norm gets two dense dimensions as from the stock model, and so it may be a kernel."""
    seen = []

    def kernel(self, hidden_states, gate):
        seen.append((hidden_states.shape, gate.shape, gate.is_contiguous()))
        return type(self).forward(self, hidden_states, gate)

    for layer in model.model.layers[:LAYERS]:  # as `kernels` replaces a forward
        layer.linear_attn.norm.forward = types.MethodType(kernel, layer.linear_attn.norm)
    assert "one copy, for a replaced Qwen3_5RMSNormGated" in str(patch(model))
    assert difference(logits_of(model), logits_of(stock())) < 1e-5
    assert seen == [((96, 16), (96, 16), True)] * LAYERS
    assert calls_in(model) == {"fused_qkvzba": LAYERS}


@qwen3_5
def test_norm_when_replaced_after_patch_is_called_with_dense_rows(model, calls_in):
    """The consumer is looked at in each call, not only once."""
    patch(model)
    assert calls_in(model) == {}
    norm = model.model.layers[0].linear_attn.norm
    norm.forward = types.MethodType(type(norm).forward, norm)
    assert calls_in(model) == {"fused_qkvzba": 1}
    assert sorted(entry.ops for entry in supported(model).already) == [(), ("fused_qkvzba",)]


def interleaved(qkvz, ba, **dims):
    """Split as Qwen3-Next lays its projections out."""
    split = hwfuse.op("fused_qkvzba")(qkvz.flatten(0, 1), ba.flatten(0, 1), **dims)
    return [part.unflatten(0, qkvz.shape[:2]) for part in split]


def swapped_b_and_a(qkvz, ba, **dims):
    """Mistake write strength for decay."""
    mixed_qkv, z, b, a = packing.split_qkvzba(qkvz, ba, **dims)
    return mixed_qkv, z, a, b


def z_first(qkvz, ba, **dims):
    """Take z from the columns in front."""
    return packing.split_qkvzba(qkvz.roll(64, dims=-1), ba, **dims)


@qwen3_5
@pytest.mark.parametrize("wrong", [interleaved, swapped_b_and_a, z_first])
def test_tokens_when_the_split_is_wrong_differ(
    stock, model, logits_of, tokens_of, monkeypatch, wrong
):
    """Negative control: the model is sensitive to what the equality tests claim."""
    monkeypatch.setattr(_qwen3_5, "packing", types.SimpleNamespace(split_qkvzba=wrong))
    patch(model)
    assert difference(logits_of(model), logits_of(stock())) > 0.1
    assert not torch.equal(tokens_of(model), tokens_of(stock()))


@qwen3_5
def test_patch_when_packing_is_off_leaves_the_class_alone(model):
    """Four linears and no copy is what the stock model does already; that is no error."""
    report = patch(model, pack="never")
    assert report.patched == ()
    assert report.skipped[0].reason == (
        "pack='never' keeps its own linears, which leaves nothing to fuse"
    )
    assert type(model.model.layers[0].linear_attn.in_proj_b) is nn.Linear

"""Qwen3.5: views or dense rows, which of them the report says, and what wrong ones would do."""

from __future__ import annotations

import dataclasses
import types

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

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
    """All four lie in one buffer of the GEMM's rows, as `split_qkvzba` takes them apart."""
    patch(model)
    layer = model.model.layers[0].linear_attn
    with torch.no_grad():
        found = layer.hwfuse_project(torch.randn(2, 3, 32))
    assert len({part.untyped_storage().data_ptr() for part in found}) == 1
    rows = found[0].as_strided((2, 3, 168), (3 * 168, 168, 1))
    dims = {"head_k_dim": 8, "head_v_dim": 16}
    expected = packing.split_qkvzba(rows[..., :160], rows[..., 160:], **dims)
    for part, view in zip(found, expected, strict=True):
        assert (part.data_ptr(), part.shape, part.stride()) == (
            view.data_ptr(),
            view.shape,
            view.stride(),
        )


class _Copies(TorchDispatchMode):
    """Counts the elements that copies move."""

    num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        if func._opname in ("clone", "copy_", "cat", "_to_copy"):
            self.num_elements += result.numel()
        return result


@qwen3_5
def test_layer_when_it_uses_views_copies_no_more_than_the_stock_one(stock, model):
    """No view is made dense further down: the norm takes z as it lies."""
    patch(model)
    counts = []
    for each in (model, stock()):
        with torch.no_grad(), _Copies() as copies:
            each.model.layers[0].linear_attn(torch.randn(2, 3, 32))
        counts.append(copies.num_elements)
    assert counts[0] == counts[1] > 0


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


def interleaved(self, mixed_qkv, z, b, a):
    """Split as Qwen3-Next lays its projections out."""
    split = hwfuse.op("fused_qkvzba")(
        torch.cat([mixed_qkv, z.flatten(-2)], dim=-1).flatten(0, 1),
        torch.cat([b, a], dim=-1).flatten(0, 1),
        head_k_dim=self.head_k_dim,
        head_v_dim=self.head_v_dim,
    )
    return [part.unflatten(0, z.shape[:2]) for part in split]


def swapped_b_and_a(self, mixed_qkv, z, b, a):
    """Mistake write strength for decay."""
    return mixed_qkv, z, a, b


def swapped_v_and_z(self, mixed_qkv, z, b, a):
    """Mistake the gate for the value."""
    qk, v = mixed_qkv.split([32, 64], dim=-1)
    return torch.cat([qk, z.flatten(-2)], dim=-1), v.unflatten(-1, z.shape[-2:]), b, a


@qwen3_5
@pytest.mark.parametrize("wrong", [interleaved, swapped_b_and_a, swapped_v_and_z])
def test_tokens_when_the_split_is_wrong_differ(
    stock, model, logits_of, tokens_of, only_rule, wrong
):
    """Negative control: the model is sensitive to what the equality tests claim."""

    def hwfuse_project(self, hidden_states):
        return wrong(self, *_qwen3_5.hwfuse_project(self, hidden_states))

    methods = (hwfuse_project, *_qwen3_5.RULE.methods[1:])
    only_rule(dataclasses.replace(_qwen3_5.RULE, name=wrong.__name__, methods=methods))
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

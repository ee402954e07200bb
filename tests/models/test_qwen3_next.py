"""Qwen3-Next: what a wrong split would do."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import hwfuse
from hwfuse.integrations import _qwen3_next
from hwfuse.integrations._rewrite import Edit
from hwfuse.integrations.transformers import patch

pytestmark = pytest.mark.parametrize("family", ["qwen3_next"], indirect=True)


def wrong_layout(self, qkvz, ba):
    """Split as Qwen3.5 lays its projections out."""
    split = hwfuse.op("fused_qkvzba")(
        qkvz.flatten(0, 1),
        ba.flatten(0, 1),
        head_k_dim=self.head_k_dim,
        head_v_dim=self.head_v_dim,
        layout="contiguous",
    )
    return [part.unflatten(0, qkvz.shape[:2]) for part in split]


def swapped_b_and_a(self, qkvz, ba):
    """Mistake write strength for decay."""
    mixed_qkv, z, b, a = _qwen3_next.hwfuse_split(self, qkvz, ba)
    return mixed_qkv, z, a, b


@pytest.mark.parametrize("wrong", [wrong_layout, swapped_b_and_a])
def test_tokens_when_the_split_is_wrong_differ(
    stock, model, logits_of, tokens_of, only_rule, wrong
):
    """Negative control: the model is sensitive to what the equality tests claim."""
    edit = Edit(_qwen3_next.STOCK, _qwen3_next.FUSED.replace("hwfuse_split", wrong.__name__))
    only_rule(
        dataclasses.replace(_qwen3_next.RULE, name=wrong.__name__, edits=(edit,), methods=(wrong,))
    )
    patch(model)
    assert (logits_of(model) - logits_of(stock())).abs().max() > 0.1
    assert not torch.equal(tokens_of(model), tokens_of(stock()))

"""Tiny models of every family, and the ways in which tests run them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

import hwfuse
from hwfuse.integrations import _tiny
from hwfuse.integrations import transformers as integration

IDS = torch.tensor([[5, 17, 101, 7, 64, 30, 9, 88, 41, 2 + 1, 77, 19]] * 2)
IDS[1] = IDS[1].roll(5)
PADDED = torch.ones_like(IDS)
PADDED[0, :4] = 0


class Family(NamedTuple):
    """A model, how it is patched, and what that gives."""

    build: Callable
    pack: str
    modules: int  # patched
    calls: dict[str, int]  # of each op, in one forward
    is_exact: bool  # no sum is taken in another order


FAMILIES = {
    "qwen3_next": Family(_tiny.tiny_qwen3_next, "auto", 3, {"fused_qkvzba": 3}, is_exact=True),
    "qwen3_5": Family(_tiny.tiny_qwen3_5, "auto", 2, {}, is_exact=False),
    "qwen3_5_dense": Family(
        # Rows of 2*16 + 2*2*16 + 4 = 100 elements: no multiple of 8.
        functools.partial(_tiny.tiny_qwen3_5, num_v_heads=2),
        "auto",
        2,
        {"fused_qkvzba": 2},
        is_exact=False,
    ),
    "qwen3_5_moe": Family(_tiny.tiny_qwen3_5_moe, "auto", 2, {}, is_exact=False),
    "gemma4": Family(
        _tiny.tiny_gemma4,
        "auto",
        4,
        {"qkv_rms_norm": 1, "q_keqv_rms_norm": 1, "q_rms_norm": 2},
        is_exact=False,
    ),
    "gemma4_never": Family(
        _tiny.tiny_gemma4,
        "never",
        4,
        {"qkv_rms_norm": 1, "q_keqv_rms_norm": 1, "q_rms_norm": 2},
        is_exact=True,
    ),
    "kimi_linear": Family(_tiny.tiny_kimi_linear, "auto", 2, {"fused_qkvbfg": 2}, is_exact=False),
}


@pytest.fixture
def family(request):
    """The family of this test; its file says which, by name."""
    return FAMILIES[request.param]


@functools.cache
def _built(family_build, dtype):
    return family_build(dtype=dtype)


@pytest.fixture
def stock(family):
    """Build the model that tests compare with; nobody changes it."""

    def stock(dtype=torch.float32):
        return _built(family.build, dtype)

    return stock


@pytest.fixture
def model(stock):
    """A copy of the stock model, to be patched."""
    return copy.deepcopy(stock())


def _logits_of(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture
def logits_of():
    """Run one forward without gradients."""
    return _logits_of


@pytest.fixture
def tokens_of():
    """Generate 8 tokens."""
    return lambda model: _greedy(model)[0]


@pytest.fixture
def calls_in():
    """Count an op's calls in one forward."""

    def calls_in(model):
        with hwfuse.record() as record:
            _logits_of(model)
        return {op: count for (op, _), count in record.calls.items()}

    return calls_in


@pytest.fixture
def only_rule(monkeypatch):
    """Make patch use one rule and no other."""
    return lambda rule: monkeypatch.setattr(integration, "_RULES", (rule,))


@pytest.fixture
def shapes_out():
    """Hook a module; returns the list that gets the shape of each output."""

    def shapes_out(module):
        shapes = []
        module.register_forward_hook(lambda _m, _inputs, output: shapes.append(tuple(output.shape)))
        return shapes

    return shapes_out


def _plain(model):
    return [model(IDS).logits]


def _left_padded(model):
    """Run with padding on the left of one row."""
    return [model(IDS, attention_mask=PADDED).logits]


def _chunked(model):
    """Continue a cached prefill: 5 + 4 tokens, then one by one."""
    cache, logits = None, []
    for part in IDS.split([5, 4, 1, 1, 1], dim=1):
        out = model(part, past_key_values=cache, use_cache=True)
        cache, logits = out.past_key_values, [*logits, out.logits]
    return logits


def _greedy(model, **options):
    """Generate 8 tokens; all logits count, not only the winners."""
    out = model.generate(
        IDS,
        attention_mask=PADDED,
        max_new_tokens=8,
        min_new_tokens=8,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return [out.sequences, *out.logits]


def _static_cache(model):
    """Generate with a cache of fixed size."""
    return _greedy(model, cache_implementation="static")


class Mode(NamedTuple):
    """A way to run a model, and how many forwards that takes."""

    run: Callable
    forwards: int


MODES = {
    "plain": Mode(_plain, 1),
    "left_padded": Mode(_left_padded, 1),
    "chunked": Mode(_chunked, 5),
    "greedy": Mode(_greedy, 8),
    "static_cache": Mode(_static_cache, 8),
}


@pytest.fixture(params=MODES)
def mode(request):
    """Each way to run a model."""
    return MODES[request.param]

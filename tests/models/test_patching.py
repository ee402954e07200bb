"""What `patch` does to classes, reports and refuses; Qwen3-Next is the example."""

from __future__ import annotations

import functools
import sys
import traceback
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

import hwfuse
from hwfuse.integrations._rewrite import SourceChanged
from hwfuse.integrations.transformers import patch, supported, unpatch

LAYERS = 3  # gated delta nets in the tiny model
pytestmark = pytest.mark.parametrize("family", ["qwen3_next"], indirect=True)


def num_patched(model):
    """Count the modules that have a patched class."""
    return sum(entry.modules for entry in supported(model).already)


def test_policy_when_it_pins_reaches_the_patched_model(model, logits_of, calls_in):
    """The choice stays with the policy of each call; a pin that cannot run is an error."""
    patch(model)
    with (
        hwfuse.using(fused_qkvzba="cuda/triton"),
        pytest.raises(hwfuse.PinnedUnavailable, match="cuda/triton is pinned"),
    ):
        logits_of(model)
    with hwfuse.using("reference/torch"):
        assert calls_in(model) == {"fused_qkvzba": LAYERS}


class _ChangedForward(Qwen3NextGatedDeltaNet):
    """A release that transposes before it concatenates."""

    def forward(self, hidden_states, **_options):
        projected_states_qkvz = self.in_proj_qkvz(hidden_states)
        projected_states_ba = self.in_proj_ba(hidden_states)
        query, key, value, z, b, a = self.fix_query_key_value_ordering(
            projected_states_qkvz, projected_states_ba
        )
        query, key, value = (x.reshape(x.shape[0], x.shape[1], -1) for x in (query, key, value))
        mixed_qkv = torch.cat((query.mT, key.mT, value.mT), dim=1)
        return mixed_qkv, z, b, a


class _ReadsDroppedName(Qwen3NextGatedDeltaNet):
    """A release that still needs `query` after the concatenation."""

    def forward(self, hidden_states, **_options):
        projected_states_qkvz = self.in_proj_qkvz(hidden_states)
        projected_states_ba = self.in_proj_ba(hidden_states)
        query, key, value, z, b, a = self.fix_query_key_value_ordering(
            projected_states_qkvz, projected_states_ba
        )
        query, key, value = (x.reshape(x.shape[0], x.shape[1], -1) for x in (query, key, value))
        mixed_qkv = torch.cat((query, key, value), dim=-1)
        return mixed_qkv + query.sum(), z, b, a


class _ChangedOrdering(Qwen3NextGatedDeltaNet):
    """A release whose projection holds a before b; the text of forward is the same."""

    def fix_query_key_value_ordering(self, mixed_qkvz, mixed_ba):
        *qkvz, b, a = super().fix_query_key_value_ordering(mixed_qkvz, mixed_ba)
        return *qkvz, a, b


def _other_forward(self, hidden_states, **_options):
    return self.out_proj(hidden_states)


class _ReplacedForward(Qwen3NextGatedDeltaNet):
    """Another library's function, set on the class."""

    forward = _other_forward


class _UnrelatedChange(Qwen3NextGatedDeltaNet):
    """A user's subclass that leaves the split alone."""

    def extra_repr(self):
        return "mine"


@pytest.mark.parametrize(
    ("changed", "shown"),
    [
        (
            _ChangedForward,
            r"(?s)-mixed_qkv = torch.cat\(\(query, key.*\+mixed_qkv = torch.cat\(\(query.mT, key",
        ),
        (_ReadsDroppedName, r"would leave query unset, which is read in: return .*query\.sum"),
        (_ReplacedForward, "expects statements that the class does not have"),
        (_ChangedOrdering, "takes b from other columns than the op"),
    ],
)
def test_patch_when_the_source_changed_is_an_error_and_changes_nothing(model, changed, shown):
    """Strict: the text that was expected and the text that is there, and no half-patched model."""
    model.model.layers[1].linear_attn.__class__ = changed
    with pytest.raises(SourceChanged, match=shown) as caught:
        patch(model)
    assert changed.__name__ in str(caught.value)
    assert num_patched(model) == 0


def test_patch_when_not_strict_reports_what_it_skipped(model):
    """The rest is patched; the report has the reason for the one that is not."""
    model.model.layers[1].linear_attn.__class__ = _ChangedForward
    report = patch(model, strict=False)
    assert [(entry.name, entry.modules) for entry in report.patched] == [
        ("Qwen3NextGatedDeltaNet", LAYERS - 1)
    ]
    (skipped,) = report.skipped
    assert (skipped.name, skipped.modules) == ("_ChangedForward", 1)
    assert "expected by the rule" in skipped.reason
    assert "skipped: _ChangedForward, 1 module: " in str(report)
    assert num_patched(model) == LAYERS - 1


def test_patch_when_a_subclass_leaves_the_text_alone_keeps_the_subclass(model, calls_in):
    """What counts is the text in force, wherever in the MRO it stands."""
    layer = model.model.layers[1].linear_attn
    layer.__class__ = _UnrelatedChange
    patch(model)
    assert "mine" in repr(layer)
    assert calls_in(model) == {"fused_qkvzba": LAYERS}


def test_patch_when_an_instance_has_its_own_forward_is_an_error(model):
    """Some libraries bind a forward to the instance, under which a class has no effect."""
    layer = model.model.layers[0].linear_attn
    layer.forward = functools.partial(Qwen3NextGatedDeltaNet.forward, layer)
    with pytest.raises(hwfuse.IntegrationError, match="an instance has a forward of its own"):
        patch(model)


def test_patch_when_the_class_was_wrapped_later_is_an_error(model, monkeypatch):
    """Compiling the text anew would silently undo another library's wrapper."""
    original = Qwen3NextGatedDeltaNet.forward

    @functools.wraps(original)
    def wrapped(*args, **kwargs):
        return original(*args, **kwargs)

    monkeypatch.setattr(Qwen3NextGatedDeltaNet, "forward", wrapped)
    with pytest.raises(SourceChanged, match="wrapped after its class was made"):
        patch(model)


def test_patch_when_accelerate_hooked_the_module_reaches_the_inner_forward(model, calls_in):
    """device_map puts a hook around the bound forward; patch and unpatch work inside it."""
    hooked = [layer.linear_attn for layer in model.model.layers[:LAYERS]]
    for module in hooked:
        module._old_forward = module.forward
        module.forward = functools.partial(lambda m, *a, **k: m._old_forward(*a, **k), module)
    patch(model)
    assert calls_in(model) == {"fused_qkvzba": LAYERS}
    for module in hooked:  # as accelerate removes its hooks
        module.forward = module._old_forward
    assert calls_in(model) == {"fused_qkvzba": LAYERS}
    unpatch(model)
    assert calls_in(model) == {}


def test_patch_when_nothing_matches_is_an_error_or_an_empty_report(family):
    """A model without a supported class is not silently left as it is."""
    with pytest.raises(hwfuse.IntegrationError, match="needed one of Qwen3NextGatedDeltaNet"):
        patch(nn.Linear(2, 2))
    assert patch(nn.Linear(2, 2), strict=False).patched == ()


def test_patch_when_an_option_is_unknown_names_the_known_ones(model):
    """Errors say which argument, what was found and what is needed."""
    with pytest.raises(hwfuse.InputError, match=r"ops: found 'rms'.*fused_qkvzba"):
        patch(model, ops=["rms"])
    with pytest.raises(hwfuse.InputError, match=r"pack: found 'yes'.*'auto'"):
        patch(model, pack="yes")


def test_patch_when_ops_leave_a_rule_out_skips_it(model):
    """`ops` limits what may be called; what it excludes is in the report."""
    report = patch(model, ops=[])
    assert report.patched == ()
    assert report.skipped[0].reason == "rule qwen3-next v1 calls fused_qkvzba"


def test_report_when_printed_says_what_changed_and_what_runs(model):
    """Classes, counts, rule, op, and the implementation on this device with its origin."""
    report = patch(model)
    assert str(report) == (
        f"Qwen3NextForCausalLM, transformers {transformers.__version__}: 3 modules patched\n"
        "  Qwen3NextGatedDeltaNet, 3 modules, rule qwen3-next v1, calls fused_qkvzba: "
        "the model's own linears, then one copy\n"
        "  fused_qkvzba runs reference/torch on cpu, order from built-in, at m = 1, 4096"
    )
    assert report.to_dict()["patched"] == [
        {
            "name": "Qwen3NextGatedDeltaNet",
            "modules": 3,
            "rule": "qwen3-next",
            "version": 1,
            "ops": ["fused_qkvzba"],
            "mode": "the model's own linears, then one copy",
        }
    ]
    assert [d["chosen"] for d in report.to_dict()["decisions"]] == ["reference/torch"] * 2


def test_traceback_when_a_call_fails_points_into_the_model_file(model, logits_of):
    """The edited text keeps the file's name and line numbers, and shows its lines."""
    patch(model)
    model.model.layers[0].linear_attn.head_v_dim = 7
    with pytest.raises(hwfuse.InputError) as caught:
        logits_of(model)
    frames = [f for f in traceback.extract_tb(caught.tb) if f.filename.startswith("<hwfuse ")]
    (frame,) = frames
    assert "modeling_qwen3_next.py" in frame.filename
    assert "self.hwfuse_split(" in frame.line
    file = Path(sys.modules[Qwen3NextGatedDeltaNet.__module__].__file__)
    at_call = file.read_text().splitlines()[frame.lineno - 1]
    assert "self.fix_query_key_value_ordering(projected_states_qkvz" in at_call

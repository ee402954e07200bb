"""hwfuse under a real Qwen3-Next: the patched model gives the same numbers and says what it runs.

The whole file runs with the transformers that is installed and, in a second process, with the
other release that `make` puts into the environment (`TRANSFORMERS_OTHER` names another folder).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import pickle
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

import hwfuse
from hwfuse.integrations import _qwen3_next
from hwfuse.integrations import transformers as integration
from hwfuse.integrations._rewrite import Edit, SourceChanged
from hwfuse.integrations._tiny import tiny_qwen3_next
from hwfuse.integrations.transformers import patch, supported, unpatch

OTHER = Path(os.environ.get("TRANSFORMERS_OTHER", Path(sys.prefix) / "transformers-5.17"))
LAYERS = 3  # gated delta nets in the tiny model
IDS = torch.tensor([[5, 17, 101, 7, 64, 30, 9, 88, 41, 2 + 1, 77, 19]] * 2)
IDS[1] = IDS[1].roll(5)
PADDED = torch.ones_like(IDS)
PADDED[0, :4] = 0


@functools.cache
def stock(dtype=torch.float32):
    """Build the model that the tests compare with; nobody changes it."""
    return tiny_qwen3_next(dtype=dtype)


@pytest.fixture
def model():
    """Copy the stock model, to be patched."""
    return copy.deepcopy(stock())


def plain(model):
    """One forward."""
    return [model(IDS).logits]


def left_padded(model):
    """One forward with padding on the left of one row."""
    return [model(IDS, attention_mask=PADDED).logits]


def chunked(model):
    """Continue a cached prefill: 5 + 4 tokens, then one by one."""
    cache, logits = None, []
    for part in IDS.split([5, 4, 1, 1, 1], dim=1):
        out = model(part, past_key_values=cache, use_cache=True)
        cache, logits = out.past_key_values, [*logits, out.logits]
    return logits


def greedy(model, **options):
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


def static_cache(model):
    """Generate with a cache of fixed size."""
    return greedy(model, cache_implementation="static")


def logits_of(model):
    """Run one forward without gradients."""
    with torch.no_grad():
        return model(IDS).logits


def calls_in(model):
    """Count the op's calls in one forward."""
    with hwfuse.record() as record:
        logits_of(model)
    return sum(count for (op, _), count in record.calls.items() if op == "fused_qkvzba")


def num_patched(model):
    """Count the modules that have a patched class."""
    return sum(entry.modules for entry in supported(model).already)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", [plain, left_padded, chunked, greedy, static_cache])
def test_outputs_when_patched_are_bit_for_bit_the_same(mode, dtype):
    """The op only moves data, so tokens and logits do not change at all."""
    patched = copy.deepcopy(stock(dtype))
    patch(patched)
    with torch.no_grad():
        expected = mode(stock(dtype))
        with hwfuse.record() as record:
            found = mode(patched)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    steps = {plain: 1, left_padded: 1, chunked: 5, greedy: 8, static_cache: 8}[mode]
    assert record.calls == {("fused_qkvzba", "reference/torch"): LAYERS * steps}


def test_compile_when_patched_traces_one_node_per_layer(model):
    """With fullgraph the op stays one node, and the numbers are those of the stock model."""
    targets = []

    def backend(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    patch(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert torch.equal(logits_of(compiled), logits_of(stock()))
    assert sum("hwfuse.fused_qkvzba" in target for target in targets) == LAYERS


def test_patch_when_called_twice_changes_nothing_more(model):
    """The second report has no new modules and names those of the first."""
    first, second = patch(model), patch(model)
    assert [entry.modules for entry in first.patched] == [LAYERS]
    assert second.patched == ()
    assert second.already == first.patched
    assert calls_in(model) == LAYERS


def test_unpatch_when_patched_gives_every_class_back(model):
    """Types are the stock ones again, and the op is not called."""
    classes = [type(module) for module in model.modules()]
    patch(model)
    assert unpatch(model) == LAYERS
    assert [type(module) for module in model.modules()] == classes
    assert calls_in(model) == 0
    assert unpatch(model) == 0


def test_state_dict_when_patched_has_the_same_keys_and_storage(model):
    """Nothing is packed, added, renamed or copied."""
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    patch(model)
    after = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    assert after == before


def test_save_pretrained_when_patched_loads_into_an_unpatched_model(model, tmp_path):
    """A saved model does not know that it was patched."""
    patch(model)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert supported(loaded).already == ()
    assert torch.equal(logits_of(loaded.eval()), logits_of(stock()))


def pickled(model):
    """Take the way of torch.save and torch.load."""
    return pickle.loads(pickle.dumps(model))  # noqa: S301 - our own bytes


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_duplicate_when_patched_is_patched_and_independent(model, duplicate):
    """The subclass has no importable name, yet copy and pickle find it."""
    patch(model)
    other = duplicate(model)
    unpatch(model)
    assert calls_in(other) == LAYERS
    assert torch.equal(logits_of(other), logits_of(stock()))


def test_gradients_when_patched_are_those_of_the_stock_model(model):
    """Training works: backward of a permutation adds nothing up, so it is exact too."""
    reference = copy.deepcopy(stock())
    patch(model)
    for each in (model, reference):
        each(IDS, labels=IDS).loss.backward()
    gradients = {name: p.grad for name, p in reference.named_parameters()}
    assert any("in_proj_ba" in name and grad.any() for name, grad in gradients.items())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, gradients[name]), name


def test_policy_when_it_pins_reaches_the_patched_model(model):
    """The choice stays with the policy of each call; a pin that cannot run is an error."""
    patch(model)
    with (
        hwfuse.using(fused_qkvzba="cuda/triton"),
        pytest.raises(hwfuse.PinnedUnavailable, match="cuda/triton is pinned"),
    ):
        logits_of(model)
    with hwfuse.using("reference/torch"):
        assert calls_in(model) == LAYERS


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
def test_logits_when_the_split_is_wrong_differ(model, monkeypatch, wrong):
    """Negative control: the model is sensitive to what the equality tests claim."""
    edit = Edit(_qwen3_next.STOCK, _qwen3_next.FUSED.replace("hwfuse_split", wrong.__name__))
    rule = dataclasses.replace(
        _qwen3_next.RULE, name=wrong.__name__, edits=(edit,), methods=(wrong,)
    )
    monkeypatch.setattr(integration, "_RULES", (rule,))
    patch(model)
    assert (logits_of(model) - logits_of(stock())).abs().max() > 0.1


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


def test_patch_when_a_subclass_leaves_the_text_alone_keeps_the_subclass(model):
    """What counts is the text in force, wherever in the MRO it stands."""
    layer = model.model.layers[1].linear_attn
    layer.__class__ = _UnrelatedChange
    patch(model)
    assert "mine" in repr(layer)
    assert calls_in(model) == LAYERS


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


def test_patch_when_accelerate_hooked_the_module_reaches_the_inner_forward(model):
    """device_map puts a hook around the bound forward; patch and unpatch work inside it."""
    hooked = [layer.linear_attn for layer in model.model.layers[:LAYERS]]
    for module in hooked:
        module._old_forward = module.forward
        module.forward = functools.partial(lambda m, *a, **k: m._old_forward(*a, **k), module)
    patch(model)
    assert calls_in(model) == LAYERS
    for module in hooked:  # as accelerate removes its hooks
        module.forward = module._old_forward
    assert calls_in(model) == LAYERS
    unpatch(model)
    assert calls_in(model) == 0


def test_patch_when_nothing_matches_is_an_error_or_an_empty_report():
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
        "  Qwen3NextGatedDeltaNet, 3 modules, rule qwen3-next v1, calls fused_qkvzba\n"
        "  fused_qkvzba runs reference/torch on cpu, order from built-in, at m = 1, 4096"
    )
    assert report.to_dict()["patched"] == [
        {
            "name": "Qwen3NextGatedDeltaNet",
            "modules": 3,
            "rule": "qwen3-next",
            "version": 1,
            "ops": ["fused_qkvzba"],
        }
    ]
    assert [d["chosen"] for d in report.to_dict()["decisions"]] == ["reference/torch"] * 2


def test_supported_when_asked_changes_nothing(model):
    """A dry run on a model or, on the meta device, on a configuration."""
    report = supported(model)
    assert (report.applied, report.patched[0].modules) == (False, LAYERS)
    assert calls_in(model) == 0
    from_config = supported(model.config)
    assert from_config.patched == report.patched
    assert from_config.decisions == ()


def test_traceback_when_a_call_fails_points_into_the_model_file(model):
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


def test_all_of_this_when_run_with_the_other_transformers_holds_too():
    """Rules go by text, so one rule serves both releases; here the second one runs."""
    if os.environ.get("TRANSFORMERS_OTHER") == "":
        pytest.skip("this is the run with the other release")
    if not OTHER.is_dir():
        stop = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        stop(f"{OTHER} is missing: `make test` installs it")
    code = (
        "import sys, pytest;"
        f"status = pytest.main([{__file__!r}, '-q', '-p', 'no:cacheprovider', '-p', 'no:xdist']);"
        "found = sys.modules['transformers'].__file__;"
        f"assert found.startswith({str(OTHER)!r}), found;"
        "sys.exit(status)"
    )
    path = os.pathsep.join(filter(None, [str(OTHER), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "TRANSFORMERS_OTHER": ""}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr

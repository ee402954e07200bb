"""Every family under `patch`: the numbers, tokens, state dict and copies of the stock model."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import hwfuse
from hwfuse.integrations.transformers import patch, supported, unpatch

NAMES = ["qwen3_next", "qwen3_5", "qwen3_5_dense", "qwen3_5_moe", "gemma4", "kimi_linear"]
COMPILED = pytest.mark.parametrize("family", NAMES, indirect=True)
ALL = pytest.mark.parametrize("family", [*NAMES, "gemma4_never"], indirect=True)
ONE_OF_EACH_RULE = pytest.mark.parametrize(
    "family", ["qwen3_next", "qwen3_5", "gemma4", "kimi_linear"], indirect=True
)
# Of logits near 2, where a GEMM over merged weights may add up in another order.  In bfloat16 it
# is how far the stock logits are from their float32 selves.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 5e-2}


def largest_difference(found, expected):
    """Return by how much lists of logits differ at most; tokens must be the same."""
    assert len(found) == len(expected)
    logits = [0.0]
    for one, other in zip(found, expected, strict=True):
        if one.is_floating_point():
            logits.append((one - other).abs().max().item())
        else:
            assert torch.equal(one, other)
    return max(logits)


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_when_patched_are_those_of_the_stock_model(family, stock, mode, dtype):
    """Bit for bit where no sum is taken in another order, and within its rounding elsewhere."""
    patched = copy.deepcopy(stock(dtype))
    patch(patched, pack=family.pack)
    with torch.no_grad():
        expected = mode.run(stock(dtype))
        with hwfuse.record() as record:
            found = mode.run(patched)
    assert largest_difference(found, expected) <= (0 if family.is_exact else ROUNDING[dtype])
    assert record.calls == {
        (op, "reference/torch"): count * mode.forwards for op, count in family.calls.items()
    }


@COMPILED
def test_compile_when_patched_traces_one_node_per_call(family, stock, model, logits_of):
    """With fullgraph each op call stays one node, and the numbers are those of the stock model."""
    targets = []

    def backend(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    patch(model, pack=family.pack)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert (
        largest_difference([logits_of(compiled)], [logits_of(stock())]) <= ROUNDING[torch.float32]
    )
    names = [target.removeprefix("hwfuse.").removesuffix(".default") for target in targets]
    assert {name: names.count(name) for name in names if hasattr(torch.ops.hwfuse, name)} == (
        family.calls
    )


@ONE_OF_EACH_RULE
def test_patch_when_called_twice_changes_nothing_more(family, model, calls_in):
    """The second report has no new modules and names those of the first."""
    first, second = patch(model), patch(model)
    assert sum(entry.modules for entry in first.patched) == family.modules
    assert second.patched == ()
    assert second.already == first.patched
    assert calls_in(model) == family.calls


@ALL
def test_unpatch_when_patched_leaves_nothing_behind(family, model, calls_in):
    """Types are the stock ones again, no op is called, and each weight has memory of its own."""
    before = [(type(module), set(vars(module))) for module in model.modules()]
    patch(model, pack=family.pack)
    assert unpatch(model) == family.modules
    assert [(type(module), set(vars(module))) for module in model.modules()] == before
    assert calls_in(model) == {}
    assert unpatch(model) == 0
    for parameter in model.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes


@ALL
def test_state_dict_when_patched_has_the_same_names_values_and_size(family, stock, model):
    """Nothing is added or renamed, and nothing lies in memory twice."""
    patch(model, pack=family.pack)
    assert vars(model.state_dict()) == vars(stock().state_dict())  # versions, for loaders
    for (name, found), (other, expected) in zip(
        model.state_dict().items(), stock().state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(found, expected)
    storages = [model.state_dict() for model in (model, stock())]
    sizes = [
        sum(
            {
                t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in s.values()
            }.values()
        )
        for s in storages
    ]
    assert sizes[0] == sizes[1]


@ONE_OF_EACH_RULE
def test_save_pretrained_when_patched_loads_into_an_unpatched_model(
    stock, model, logits_of, tmp_path
):
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


@ONE_OF_EACH_RULE
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_duplicate_when_patched_is_patched_and_independent(
    family, model, logits_of, calls_in, duplicate
):
    """The subclass has no importable name, yet copy and pickle find it; no memory is shared."""
    patch(model)
    expected = logits_of(model)
    other = duplicate(model)
    mine = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert mine.isdisjoint(p.untyped_storage().data_ptr() for p in other.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert calls_in(other) == family.calls
    assert torch.equal(logits_of(other), expected)


@ONE_OF_EACH_RULE
def test_gradients_when_patched_are_those_of_the_stock_model(stock, model):
    """Training works, through packed weights too: each parameter gets its own rows' gradient."""
    reference = copy.deepcopy(stock())
    patch(model)
    ids = torch.arange(24).view(2, 12)
    for each in (model, reference):
        each(ids, labels=ids).loss.backward()
    for (name, parameter), expected in zip(
        model.named_parameters(), reference.parameters(), strict=True
    ):
        assert (expected.grad is None) == (parameter.grad is None), name
        if expected.grad is not None:
            torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-4, atol=1e-6)


@ONE_OF_EACH_RULE
def test_supported_when_asked_changes_nothing(family, model, calls_in):
    """A dry run on a model or, on the meta device, on a configuration."""
    report = supported(model)
    assert (report.applied, sum(entry.modules for entry in report.patched)) == (
        False,
        family.modules,
    )
    assert calls_in(model) == {}
    from_config = supported(model.config)
    assert from_config.patched == report.patched
    assert from_config.decisions == ()

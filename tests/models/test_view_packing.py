"""Weights that are views of one tensor: what breaks that is noticed, and never the numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed import device_mesh
from torch.distributed.tensor import distribute_tensor

import hwfuse
from hwfuse.integrations.transformers import patch, supported

packing_families = pytest.mark.parametrize(
    "family", ["qwen3_5", "gemma4", "kimi_linear"], indirect=True
)
qwen3_5 = pytest.mark.parametrize("family", ["qwen3_5"], indirect=True)


def difference(one, other):
    """Return by how much logits differ at most."""
    return (one.float() - other.float()).abs().max().item()


def num_shared(model):
    """Count the parameters that are a part of a larger tensor."""
    return sum(p.untyped_storage().nbytes() > p.nbytes for p in model.parameters())


def layer_of(model):
    """Return the first layer's delta net."""
    return model.model.layers[0].linear_attn


def mine(model, logits_of):
    """Return the logits that the model's current weights give without hwfuse."""
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stock = type(model)(model.config).eval()
    stock.load_state_dict(weights)
    return logits_of(stock.to(model.dtype))


@packing_families
def test_dtype_when_changed_packs_again(stock, model, logits_of, calls_in, family):
    """`.to` moves each parameter by itself; afterwards they share memory again."""
    patch(model)
    shared = num_shared(model)
    model.to(torch.bfloat16)
    assert num_shared(model) == shared > 0
    assert calls_in(model) == family.calls
    assert difference(logits_of(model), logits_of(stock(torch.bfloat16))) < 5e-2


@packing_families
def test_copy_when_made_is_packed_too(model):
    """A deep copy has packs of its own."""
    patch(model)
    assert num_shared(copy.deepcopy(model)) == num_shared(model) > 0


@qwen3_5
def test_autocast_when_on_runs_the_model_s_own_linears(stock, model):
    """Then each linear casts its input and weight, which a packed one would not do alike."""
    ids = torch.arange(8)[None]
    patch(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(ids).logits, stock()(ids).logits)


def moved_alone(model):
    """Give one parameter other memory, behind the model's back."""
    layer_of(model).in_proj_z.to(torch.float64).to(torch.float32)
    layer_of(model).in_proj_z.weight.data.mul_(2)


def replaced(model):
    """Set another parameter."""
    layer_of(model).in_proj_z.weight = nn.Parameter(2 * layer_of(model).in_proj_z.weight.detach())


def changed_in_place(model):
    """Do what an optimiser does."""
    layer_of(model).in_proj_z.weight.data.mul_(2)


def assigned(model):
    """Load a state dict by assignment."""
    state = {name: 1.5 * tensor for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


@qwen3_5
@pytest.mark.parametrize("change", [moved_alone, changed_in_place])
def test_weights_when_changed_behind_the_pack_count(model, logits_of, change):
    """The next call sees the new numbers, and packs again what was torn apart."""
    patch(model)
    before, shared = logits_of(model), num_shared(model)
    change(model)
    assert difference(logits_of(model), before) > 1e-2
    assert difference(logits_of(model), mine(model, logits_of)) < 1e-5
    assert num_shared(model) == shared


@qwen3_5
@pytest.mark.parametrize("change", [replaced, assigned])
def test_parameters_when_replaced_count_and_are_packed_by_the_next_patch(model, logits_of, change):
    """New objects may be somebody's own, like a shard's: nothing moves them unasked."""
    patch(model)
    before, shared = logits_of(model), num_shared(model)
    change(model)
    assert difference(logits_of(model), before) > 1e-2
    assert difference(logits_of(model), mine(model, logits_of)) < 1e-5
    assert num_shared(model) < shared
    assert "its own linears: its parameters are not those that were packed" in str(supported(model))
    assert [entry.mode[:7] for entry in patch(model).already] == ["one GEM"]
    assert num_shared(model) == shared
    assert difference(logits_of(model), mine(model, logits_of)) < 1e-5


@qwen3_5
def test_compiled_layer_when_weights_are_replaced_computes_with_them(model):
    """A graph holds the packed tensor, and guards on the parameters that were its rows."""
    patch(model)
    layer, hidden = layer_of(model), torch.randn(2, 3, 32)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.no_grad():
        before = compiled(hidden)
        for change in (replaced, assigned, changed_in_place):
            change(model)
            found = compiled(hidden)
            assert difference(found, before) > 1e-4
            assert difference(found, layer(hidden)) < 1e-5
            before = found
        model.to(torch.bfloat16)
        assert torch.equal(compiled(hidden.bfloat16()), layer(hidden.bfloat16()))


# Dynamo makes one of every autograd function that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@qwen3_5
def test_compiled_layer_when_trained_gives_each_parameter_its_gradient(stock, model):
    """The graph has the packed weight as a function of its parameters, too."""
    patch(model)
    hidden = torch.randn(2, 3, 32)
    compiled = torch.compile(layer_of(model), fullgraph=True, backend="aot_eager")
    compiled(hidden).square().sum().backward()
    reference = copy.deepcopy(layer_of(stock()))
    reference(hidden).square().sum().backward()
    for parameter, expected in zip(
        layer_of(model).parameters(), reference.parameters(), strict=True
    ):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-4, atol=1e-6)


class _Adapter(nn.Module):
    """Stands for LoRA: a module around the linear."""

    def __init__(self, base):
        super().__init__()
        self.base, self.out_features = base, base.out_features

    def forward(self, x):
        return self.base(x) + 0.1


@qwen3_5
def test_adapter_when_put_around_a_linear_later_is_called(model, logits_of):
    """The packed GEMM would leave it out."""
    patch(model)
    before = logits_of(model)
    layer_of(model).in_proj_z = _Adapter(layer_of(model).in_proj_z)
    assert difference(logits_of(model), before) > 1e-2
    assert "its own linears: one of its linears is a _Adapter" in str(supported(model))


@qwen3_5
def test_hook_when_set_on_a_linear_later_is_called(model, logits_of, shapes_out):
    """Hooks read activations and move weights: never around them."""
    patch(model)
    seen = shapes_out(layer_of(model).in_proj_b)
    logits_of(model)
    assert seen == [(2, 12, 4)]


@pytest.fixture
def mesh():
    """A mesh of this one process."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def as_dtensor(linear, mesh):
    """Do what tensor parallelism does."""
    linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh))


def as_adapter(linear, mesh):
    """Change the class, as adapters and quantisers do."""
    linear.__class__ = type("LoraLinear", (nn.Linear,), {})


def as_float8(linear, mesh):
    """Store it in eight bits."""
    linear.weight = nn.Parameter(linear.weight.to(torch.float8_e4m3fn), requires_grad=False)


def as_float64(linear, mesh):
    """Keep one in another precision."""
    linear.to(torch.float64)


def with_bias(linear, mesh):
    """Add one."""
    linear.bias = nn.Parameter(torch.zeros(linear.out_features))


def with_own_forward(linear, mesh):
    """Do what accelerate does to offload."""
    linear.forward = linear.forward


def elsewhere(linear, mesh):
    """Keep one on another device."""
    linear.to("meta")


OBSTACLES = {
    as_dtensor: "the weight of one of its linears is a DTensor",
    as_adapter: "one of its linears is a LoraLinear",
    as_float8: "the weights of its linears are torch.float32 and torch.float8_e4m3fn",
    as_float64: "the weights of its linears are torch.float32 and torch.float64",
    with_bias: "one of its linears has a bias",
    with_own_forward: "one of its linears has a forward of its own",
    elsewhere: "the weights of its linears lie on cpu and meta",
}


@qwen3_5
@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_patch_when_a_linear_is_not_plain_leaves_its_module_alone(model, mesh, obstacle):
    """The reason is in the report; asking for views is then an error."""
    obstacle(layer_of(model).in_proj_a, mesh)
    with pytest.raises(hwfuse.IntegrationError, match="pack='view' needs plain linears, but "):
        patch(model, pack="view")
    report = patch(model)
    assert [(entry.modules, entry.mode[:7]) for entry in report.patched] == [(1, "one GEM")]
    (skipped,) = report.skipped
    assert skipped.reason == (
        f"{OBSTACLES[obstacle]}: its own linears are called, which leaves nothing to fuse"
    )
    assert num_shared(model) == 4


@qwen3_5
def test_model_when_patched_on_meta_is_packed_when_it_gets_memory(stock, model, logits_of):
    """There is nothing to move yet; `to_empty` and loading into it are the usual way on."""
    empty = copy.deepcopy(model).to("meta")
    patch(empty)
    empty.to_empty(device="cpu")
    assert num_shared(empty) == 8
    for target, source in zip(empty.buffers(), stock().buffers(), strict=True):
        target.copy_(source)
    empty.load_state_dict(model.state_dict())
    assert difference(logits_of(empty), logits_of(stock())) < 1e-5


@qwen3_5
def test_training_when_patched_in_inference_mode_works(model):
    """The packed tensor is an ordinary one, whatever mode it was made in."""
    with torch.inference_mode():
        patch(model)
        model.to(torch.float32)
    ids = torch.arange(8)[None]
    model(ids, labels=ids).loss.backward()
    assert layer_of(model).in_proj_b.weight.grad.any()

"""What every op's spec file promises, whichever op it is."""

import importlib
import inspect

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import hwfuse

OPS = hwfuse.op_names()
SMALL = {
    "fused_qkvzba": {"num_k_heads": 2, "num_v_heads": 6},
    "fp8_blockscale_gemm": {"n": 192, "k": 256},
    "fp8_group_quant": {"k": 640},
    "w4a8_grouped_gemm": {"num_experts": 3, "n": 192, "k": 512},
    "w4a8_moe": {"num_experts": 3, "n": 128, "k": 512},
}


def spec_of(name):
    """Return the module of one op."""
    return importlib.import_module(f"hwfuse.ops.{name}")


def reference_of(name):
    """Return the reference's function."""
    return getattr(importlib.import_module(f"hwfuse_reference.torch_ops.{name}"), name)


def small_inputs(name, **options):
    """Return arguments of a size for tests."""
    return spec_of(name).make_inputs(**SMALL.get(name, {}), **options)


def tensors(results):
    """Return the results as a tuple, whatever the op returns."""
    if results is None:
        return ()
    return (results,) if isinstance(results, torch.Tensor) else results


def formats(results):
    """Return what the contract fixes besides the values."""
    return [(t.dtype, t.shape, t.stride()) for t in tensors(results)]


@pytest.mark.parametrize("name", OPS)
def test_docstring_has_the_parts_and_every_argument(name):
    """The docstring is the contract: shapes, each argument, results, errors, source."""
    function = getattr(spec_of(name), name)
    text = inspect.getdoc(function)
    parts = ("Shapes:", "Args:", "Returns:", "Raises:", "Empty input:", "Source:")
    positions = [text.index(part) for part in parts]
    assert positions == sorted(positions)
    assert all(f"\n    {argument}: " in text for argument in inspect.signature(function).parameters)


@pytest.mark.parametrize("name", OPS)
def test_signature_is_that_of_sizes_outputs_and_reference(name):
    """One call fits all four."""
    spec = spec_of(name)
    parameters = inspect.signature(getattr(spec, name)).parameters
    for function in (spec.sizes, spec.outputs, reference_of(name)):
        assert inspect.signature(function).parameters == parameters
    assert list(small_inputs(name, m=1)) == list(parameters)


@pytest.mark.parametrize("m", [0, 1, 5])
@pytest.mark.parametrize("name", OPS)
def test_reference_returns_the_format_that_outputs_allocates(name, m):
    """Dtypes, shapes and strides are part of the contract; COMPARE names each result."""
    spec = spec_of(name)
    expected = formats(spec.outputs(**small_inputs(name, m=m)))
    assert formats(reference_of(name)(**small_inputs(name, m=m))) == expected
    assert len(spec.COMPARE) == len(expected or spec.MUTATES)


@pytest.mark.parametrize("name", OPS)
def test_inputs_are_the_same_for_a_seed_and_exist_on_meta(name):
    """Seeded, and on meta the same forms without memory: explain asks for absent hardware."""
    first, second, other = (small_inputs(name, m=5, seed=seed) for seed in (3, 3, 4))
    meta = small_inputs(name, m=5, device="meta")
    names = [n for n, value in first.items() if isinstance(value, torch.Tensor)]
    raw = {n: [x[n].contiguous().view(torch.uint8) for x in (first, second, other)] for n in names}
    assert all(torch.equal(a, b) for a, b, _ in raw.values())
    assert not all(torch.equal(a, c) for a, _, c in raw.values())
    assert formats(tuple(meta[n] for n in names)) == formats(tuple(first[n] for n in names))
    assert all(meta[n].is_meta for n in names)


@pytest.mark.parametrize("name", OPS)
def test_dimension_names_mean_the_sizes_of_that_name(name):
    """The guard reads m from a shape where a fact says m."""
    spec, inputs = spec_of(name), small_inputs(name, m=5)
    values = inputs | spec.sizes(**inputs)._asdict()
    for tensor, text in spec.DIMS.items():
        named = dict(zip(text.split(), inputs[tensor].shape, strict=True))
        assert all(values[n] == size for n, size in named.items() if n in values)


@pytest.mark.parametrize("name", OPS)
def test_symbolic_number_of_rows_is_never_guarded_on(name):
    """An exported graph with a dynamic M holds for every M, with exact strides."""
    spec, inputs = spec_of(name), small_inputs(name, m=7)
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)
    for argument, value in inputs.items():
        if isinstance(value, torch.Tensor):
            has_rows = spec.DIMS.get(argument, "").startswith("m ")
            sizes = [DimDynamic.STATIC] * value.ndim
            sizes[0] = DimDynamic.DUCK if has_rows else DimDynamic.STATIC
            context = StatelessSymbolicContext(sizes)
            inputs[argument] = mode.from_tensor(value, symbolic_context=context)
    with mode:
        fakes = tensors(spec.outputs(**inputs))
    assert environment.guards == []
    real = formats(spec.outputs(**small_inputs(name, m=7)))
    found = [(t.dtype, tuple(map(int, t.shape)), tuple(map(int, t.stride()))) for t in fakes]
    assert found == real

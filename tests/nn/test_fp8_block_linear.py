"""FP8BlockLinear: the checkpoint's parameters, blocks of 128 with a short last one, two ops."""

from __future__ import annotations

import copy
import io

import pytest
import torch

import hwfuse
from hwfuse.nn import FP8BlockLinear

K = 256


def layer_of(n, *, seed=0, **options):
    """Build a layer with random weights and scales that differ from block to block."""
    generator = torch.Generator().manual_seed(seed)
    layer = FP8BlockLinear(K, n, **options)
    layer.weight.copy_(torch.randn(n, K, generator=generator))
    exponents = torch.randint(-3, 4, layer.weight_scale_inv.shape, generator=generator)
    layer.weight_scale_inv.copy_(exponents.float().exp2() * 1.25)
    if layer.bias is not None:
        layer.bias.copy_(torch.randn(n, generator=generator))
    return layer


def activations(*shape, dtype=torch.bfloat16):
    """Return random numbers with the last dimension K."""
    return torch.randn(*shape, K, generator=torch.Generator().manual_seed(1)).to(dtype)


def simulated(layer, x, *, block=128):
    """Dequantise both sides with plain torch and multiply in float64."""
    groups = x.float().unflatten(-1, (-1, 128))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448
    rounded = (groups * (1 / scale)).to(torch.float8_e4m3fn).double() * scale
    rows = torch.arange(layer.out_features) // block
    columns = torch.arange(K) // 128
    weight = layer.weight.double() * layer.weight_scale_inv[rows][:, columns]
    return rounded.flatten(-2) @ weight.T


def error(found, expected):
    """Return the relative error in the Frobenius norm."""
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("n", [1, 128, 192, 576])
def test_result_when_the_last_block_is_short_uses_its_own_scale(n):
    """Row i of the scale serves rows 128*i and on; the result is off by bfloat16's rounding."""
    layer, x = layer_of(n), activations(5)
    assert layer.weight_scale_inv.shape == ((n + 127) // 128, 2)
    assert error(layer(x), simulated(layer, x)) < 2e-3


def test_result_when_192_rows_are_two_blocks_is_not_that_of_two_times_96():
    """Negative control: a block derived as rows / scale rows gives other numbers."""
    layer, x = layer_of(192), activations(5)
    assert error(layer(x), simulated(layer, x, block=96)) > 0.1


def test_result_when_the_last_scale_row_is_another_differs_in_these_rows_only():
    """Negative control: the fifth row of 576 rows' scales is read."""
    layer, x = layer_of(576), activations(5)
    expected = layer(x)
    layer.weight_scale_inv[4] = layer.weight_scale_inv[3] * 2
    changed = (layer(x) != expected).any(dim=0)
    assert not changed[:512].any()
    assert changed[512:].all()


def test_state_dict_when_saved_has_the_names_of_the_checkpoint():
    """Nothing is packed or renamed, and nothing takes a gradient."""
    layer = FP8BlockLinear(K, 576, bias=True, device="meta", dtype=torch.bfloat16)
    found = {name: (list(t.shape), t.dtype) for name, t in layer.state_dict().items()}
    assert found == {
        "weight": ([576, K], torch.float8_e4m3fn),
        "weight_scale_inv": ([5, 2], torch.float32),
        "bias": ([576], torch.bfloat16),
    }
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_load_state_dict_when_a_scale_row_is_missing_names_the_parameter():
    """Four rows of scales for 576 rows are an error, not four larger blocks."""
    state = layer_of(576).state_dict()
    state["weight_scale_inv"] = state["weight_scale_inv"][:4]
    with pytest.raises(RuntimeError, match="size mismatch for weight_scale_inv"):
        FP8BlockLinear(K, 576).load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (3,), (0,), (2, 3), (2, 0, 3)], ids=str)
def test_result_when_x_has_any_rank_keeps_its_leading_dimensions_and_dtype(shape, dtype):
    """As for nn.Linear: only the last dimension changes."""
    layer, x = layer_of(192), activations(*shape, dtype=dtype)
    out = layer(x)
    assert (out.shape, out.dtype) == ((*shape, 192), dtype)
    assert torch.equal(out.reshape(-1, 192), layer(x.reshape(-1, K)))


@pytest.mark.parametrize("scale_format", ["fp32", "ue8m0"])
@pytest.mark.parametrize("out_dtype", [None, torch.float16])
def test_result_when_x_is_quantised_already_is_the_same(scale_format, out_dtype):
    """A norm that quantises hands over codes and scales; without out_dtype it is bfloat16."""
    layer = layer_of(576, scale_format=scale_format, out_dtype=out_dtype)
    x = activations(7)
    pair = hwfuse.op("fp8_group_quant")(x, scale_format=scale_format, scale_layout="column_tma")
    out = layer(pair)
    assert out.dtype == (out_dtype or torch.bfloat16)
    assert torch.equal(out, layer(x))


def test_scale_format_when_ue8m0_changes_the_result():
    """The option reaches the activations' scales."""
    x = activations(7)
    assert not torch.equal(layer_of(192)(x), layer_of(192, scale_format="ue8m0")(x))


def test_result_when_there_is_a_bias_adds_it_in_the_result_dtype():
    """The GEMM has no bias; a float32 one does not change the result's dtype."""
    layer, x = layer_of(192, bias=True), activations(3)
    out = layer(x)
    bias, layer.bias = layer.bias, None
    assert layer.bias is None
    assert torch.equal(out, layer(x) + bias.bfloat16())


def test_x_when_float32_needs_a_declared_out_dtype():
    """The GEMM returns bfloat16 or float16; which one is not guessed."""
    x = activations(3).float()
    with pytest.raises(hwfuse.InputError, match=r"x\.dtype: found torch\.float32, needed"):
        layer_of(192)(x)
    out = layer_of(192, out_dtype=torch.bfloat16)(x)
    assert torch.equal(out, layer_of(192)(x.bfloat16()))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: FP8BlockLinear(192, 8),
            "in_features: found 192, needed a positive multiple of 128",
        ),
        (lambda: FP8BlockLinear(0, 8), "in_features: found 0"),
        (
            lambda: FP8BlockLinear(128, 8, block_size=(64, 128)),
            r"block_size: found \(64, 128\), needed \(128, 128\)",
        ),
        (
            lambda: layer_of(8)(torch.zeros(2, 128, dtype=torch.bfloat16)),
            r"x\.shape\[-1\]: found 128, needed in_features = 256",
        ),
        (lambda: layer_of(8).half()(activations(2)), r"found torch\.float16, needed"),
    ],
)
def test_layer_when_something_does_not_fit_names_it(build, message):
    """Argument, what was found, what is needed; a cast of the whole model is found out."""
    with pytest.raises(hwfuse.InputError, match=message):
        build()


def test_forward_when_recorded_quantises_once_and_multiplies_once():
    """Two ops, whatever the leading dimensions."""
    with hwfuse.record() as record:
        layer_of(576)(activations(2, 3))
    assert {op: count for (op, _), count in record.calls.items()} == {
        "fp8_group_quant": 1,
        "fp8_blockscale_gemm": 1,
    }


def test_compile_when_fullgraph_gives_the_same_bits():
    """Each op is one node, for any number of tokens."""
    layer = layer_of(576, bias=True)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for x in (activations(2, 3), activations(4, 7)):
        assert torch.equal(compiled(x), layer(x))


def saved(layer):
    """Take the way through a file."""
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, saved])
def test_duplicate_when_made_computes_the_same(duplicate):
    """The layer holds nothing but parameters and options."""
    layer, x = layer_of(192, bias=True), activations(3)
    assert torch.equal(duplicate(layer)(x), layer(x))

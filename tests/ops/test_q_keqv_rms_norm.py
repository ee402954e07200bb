"""q_keqv_rms_norm: the numbers of qkv_rms_norm with one raw tensor as k and as v."""

import pytest
import torch

from hwfuse import InputError
from hwfuse.ops.q_keqv_rms_norm import COMPARE, make_inputs
from hwfuse.testing.compare import compare
from hwfuse_reference.torch_ops.q_keqv_rms_norm import q_keqv_rms_norm

SHAPES = [(512, 32, 4), (512, 16, 2), (256, 8, 1), (64, 3, 5)]


def normed(x, weight, head_dim, eps=1e-6):
    """Return the norm of every head vector in float64; no weight means 1."""
    heads = x.double().reshape(x.shape[0], -1, head_dim)
    y = heads / torch.sqrt((heads * heads).mean(dim=2, keepdim=True) + eps)
    return (y if weight is None else y * weight.double()).reshape(x.shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("head_dim", "num_q_heads", "num_kv_heads"), SHAPES)
def test_heads_agree_with_float64_rounded_once(head_dim, num_q_heads, num_kv_heads, dtype):
    """Both k and v come from the raw kv, the one weighted, the other not."""
    inputs = make_inputs(
        m=9, num_q_heads=num_q_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype,
        row_pad=24,
    )  # fmt: skip
    sources = {"q": ("q", "q_weight"), "k": ("kv", "k_weight"), "v": ("kv", None)}
    results = q_keqv_rms_norm(**inputs)
    for (name, (source, weight)), result in zip(sources.items(), results, strict=True):
        exact = normed(inputs[source], inputs.get(weight), head_dim).to(dtype)
        assert compare(COMPARE[name], result, exact, {}) is None


def wrong_v(kv, k, k_weight, what):
    """Return v made in a wrong way."""
    if what == "from the weighted k":
        return normed(k, None, 64).bfloat16()
    if what == "weighted":
        return normed(kv, k_weight, 64).bfloat16()
    if what == "from the rounded k, weight divided out":
        return (k.double().view(-1, 64) / k_weight.double()).view(kv.shape).bfloat16()
    return kv


@pytest.mark.parametrize(
    "what", ["from the weighted k", "weighted", "from the rounded k, weight divided out", "raw"]
)
def test_comparator_refuses_v_that_is_not_the_norm_of_the_raw_kv(what):
    """V depends neither on the weight of k nor on its rounding."""
    inputs = make_inputs(m=9, num_q_heads=2, num_kv_heads=2, head_dim=64)
    _, k, v = q_keqv_rms_norm(**inputs)
    wrong = wrong_v(inputs["kv"], k, inputs["k_weight"], what)
    assert "ulps" in compare(COMPARE["v"], wrong, v, {})


def test_weight_is_the_plain_factor_and_changes_only_its_own_result():
    """Gemma4's weight is w, not 1 + w; v has none."""
    one = torch.ones(2, 8)
    weights = torch.full((8,), 3.0), torch.full((8,), 5.0)
    q, k, v = q_keqv_rms_norm(one, one, *weights, head_dim=8, eps=0.0)
    assert (q.unique().item(), k.unique().item(), v.unique().item()) == (3.0, 5.0, 1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_k_and_v_are_distinct_memory_and_kv_stays_raw(num_kv_heads, dtype):
    """The rotation of k in place must reach neither v nor the projection."""
    inputs = make_inputs(
        m=3, num_q_heads=2, num_kv_heads=num_kv_heads, head_dim=64, dtype=dtype,
        weight_dtype=torch.float32,
    )  # fmt: skip
    raw = inputs["kv"].clone()
    results = q_keqv_rms_norm(**inputs)
    storages = {t.untyped_storage().data_ptr() for t in (inputs["q"], inputs["kv"], *results)}
    assert len(storages) == 1 + len(results)
    assert torch.equal(inputs["kv"], raw)


@pytest.mark.parametrize("m", [0, 1, 3])
def test_three_dimensions_give_the_same_numbers_in_three_dimensions(m):
    """``[M, heads, D]`` is the same memory as ``[M, heads * D]``."""
    inputs = make_inputs(m=m, num_q_heads=4, num_kv_heads=2, head_dim=64)
    heads = {name: inputs[name].unflatten(1, (-1, 64)) for name in ("q", "kv")}
    flat = q_keqv_rms_norm(**inputs)
    for result, expected in zip(q_keqv_rms_norm(**inputs | heads), flat, strict=True):
        assert result.shape == (m, expected.shape[1] // 64, 64)
        assert result.is_contiguous()
        assert torch.equal(result.flatten(1), expected)


def test_gradient_of_kv_is_the_sum_of_those_through_k_and_v():
    """Both results depend on the one tensor."""
    inputs = make_inputs(m=3, num_q_heads=2, num_kv_heads=1, head_dim=4, dtype=torch.float32)
    inputs["eps"] = 1e-2
    names = ("q", "kv", "q_weight", "k_weight")
    tensors = [inputs.pop(name).clone().requires_grad_() for name in names]
    loss = sum(r.sin().sum() for r in q_keqv_rms_norm(*tensors, **inputs))
    gradients = torch.autograd.grad(loss, tensors)
    q, kv, q_weight, k_weight = (t.detach().double().requires_grad_() for t in tensors)
    pairs = ((q, q_weight), (kv, k_weight), (kv, None))
    exact = sum(normed(x, w, 4, 1e-2).sin().sum() for x, w in pairs)
    wanted = torch.autograd.grad(exact, (q, kv, q_weight, k_weight))
    for gradient, expected in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-6)


X = torch.zeros(3, 32, dtype=torch.bfloat16)
BAD = {
    "dtype": ({"q": X[:, :16].int()}, "q.dtype: found torch.int32, needed torch.bfloat16 or"),
    "other dtype": ({"kv": X[:, :8].float()}, "kv.dtype: found torch.float32, needed .*bfloat16"),
    "stride": ({"kv": X[:, ::4]}, r"kv.stride\(-1\): found 4 .*, needed 1"),
    "rows": ({"kv": X[:2, :8]}, r"kv.shape\[0\]: found 2, needed 3, the number of rows of q"),
    "width": ({"kv": X[:, :12]}, r"kv.shape\[1\]: found 12, needed a positive multiple of 8"),
    "3-D": ({"kv": X.view(3, 2, 16)}, r"kv.shape: found \(3, 2, 16\), .* head_dim = 8"),
    "weight": ({"k_weight": X[0, :16]}, r"k_weight.shape\[0\]: found 16, needed head_dim = 8"),
    "device": ({"kv": X[:, :8].to("meta")}, "kv.device: found meta, needed cpu, as q"),
    "head_dim": ({"head_dim": 0}, "head_dim: found 0, needed a positive number"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_argument_is_refused_with_what_was_found_and_needed(change, message):
    """Nothing is cast, cut or copied to make a wrong call fit."""
    good = make_inputs(m=3, num_q_heads=2, num_kv_heads=1, head_dim=8)
    with pytest.raises(InputError, match=message):
        q_keqv_rms_norm(**good | change)

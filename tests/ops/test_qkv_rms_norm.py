"""qkv_rms_norm: against float64, one rounding, plain weights for q and k, none for v."""

import pytest
import torch

from hwfuse import InputError
from hwfuse.ops.qkv_rms_norm import make_inputs
from hwfuse_reference.torch_ops.qkv_rms_norm import qkv_rms_norm

SHAPES = [(128, 8, 1), (256, 8, 2), (512, 16, 2), (256, 16, 8), (64, 3, 5)]


def normed(x, weight, head_dim, eps=1e-6):
    """Return the norm of every head vector in float64, one vector at a time."""
    rows = []
    for row in x.flatten(1).double():
        heads = [h / torch.sqrt((h * h).mean() + eps) for h in row.split(head_dim)]
        rows.append(torch.cat([h if weight is None else h * weight.double() for h in heads]))
    return torch.stack(rows).view(x.shape)


def ulps_apart(result, exact):
    """Return how many representable numbers lie between each result and the rounded exact one."""
    integer = torch.int32 if result.dtype == torch.float32 else torch.int16
    ordinals = []
    for x in (result, exact.to(result.dtype)):
        i = x.contiguous().view(integer).long()
        ordinals.append(torch.where(i < 0, torch.iinfo(integer).min - i, i))
    return (ordinals[0] - ordinals[1]).abs()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("head_dim", "num_q_heads", "num_kv_heads"), SHAPES)
def test_heads_agree_with_float64_rounded_once(head_dim, num_q_heads, num_kv_heads, dtype):
    """A second rounding, of x * inv or of the weight, would move a tenth of the elements."""
    inputs = make_inputs(
        m=9, num_q_heads=num_q_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype,
        row_pad=24,
    )  # fmt: skip
    results = qkv_rms_norm(**inputs)
    weights = (inputs["q_weight"], inputs["k_weight"], None)
    for name, result, weight in zip("qkv", results, weights, strict=True):
        apart = ulps_apart(result, normed(inputs[name], weight, head_dim))
        assert apart.max() <= 1
        assert (apart == 0).float().mean() >= 0.999


def test_float32_agrees_with_float64_to_a_few_ulps():
    """float32 in, float32 out: nothing in between is rounded further."""
    inputs = make_inputs(m=5, num_q_heads=4, num_kv_heads=2, dtype=torch.float32)
    q, _, _ = qkv_rms_norm(**inputs)
    assert ulps_apart(q, normed(inputs["q"], inputs["q_weight"], 256)).max() <= 4


def test_weight_is_the_plain_factor_and_v_has_none():
    """Gemma4's weight is w, not 1 + w."""
    one = torch.ones(2, 8)
    weights = torch.full((8,), 3.0), torch.full((8,), 5.0)
    q, k, v = qkv_rms_norm(one, one, one, *weights, head_dim=8, eps=0.0)
    assert (q.unique().item(), k.unique().item(), v.unique().item()) == (3.0, 5.0, 1.0)


def test_weights_may_be_float32_beside_bfloat16_heads():
    """The weight enters in float32 whatever its dtype."""
    inputs = make_inputs(m=4, num_q_heads=2, num_kv_heads=1, weight_dtype=torch.float32)
    _, k, _ = qkv_rms_norm(**inputs)
    assert ulps_apart(k, normed(inputs["k"], inputs["k_weight"], 256)).max() <= 1


@pytest.mark.parametrize("head_dim", [64, 128])
def test_each_head_is_normed_alone(head_dim):
    """Another head of the row, however large, changes nothing."""
    inputs = make_inputs(m=2, num_q_heads=256 // head_dim, num_kv_heads=1, head_dim=head_dim)
    before, _, _ = qkv_rms_norm(**inputs)
    inputs["q"][:, :head_dim] *= 64
    after, _, _ = qkv_rms_norm(**inputs)
    assert torch.equal(before[:, head_dim:], after[:, head_dim:])


def test_zero_heads_stay_zero_and_eps_dampens_small_ones():
    """The eps stands under the root, beside the mean square."""
    x = torch.zeros(2, 4)
    x[1] = 1e-3
    q, _, _ = qkv_rms_norm(x, x, x, torch.ones(4), torch.ones(4), head_dim=4, eps=3e-6)
    assert (q[0] == 0).all()
    assert q[1].tolist() == pytest.approx([0.5] * 4)


@pytest.mark.parametrize("m", [0, 1, 3])
def test_three_dimensions_give_the_same_numbers_in_three_dimensions(m):
    """``[M, heads, D]`` is the same memory as ``[M, heads * D]``."""
    inputs = make_inputs(m=m, num_q_heads=4, num_kv_heads=2, head_dim=64)
    heads = {
        name: inputs[name].unflatten(1, (n, 64)) for name, n in zip("qkv", (4, 2, 2), strict=True)
    }
    for flat, result in zip(qkv_rms_norm(**inputs), qkv_rms_norm(**inputs | heads), strict=True):
        assert result.shape == (m, flat.shape[1] // 64, 64)
        assert result.is_contiguous()
        assert torch.equal(result.flatten(1), flat)


def test_gradient_agrees_with_differences():
    """The reference's own autograd is the gradient of the formula."""
    inputs = make_inputs(m=3, num_q_heads=2, num_kv_heads=1, head_dim=4, dtype=torch.float32)
    inputs["eps"] = 1e-2
    names = ("q", "k", "v", "q_weight", "k_weight")
    tensors = [inputs.pop(name).clone().requires_grad_() for name in names]
    gradients = torch.autograd.grad(
        sum(r.sin().sum() for r in qkv_rms_norm(*tensors, **inputs)), tensors
    )
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    weights = (doubles[3], doubles[4], None)
    exact = torch.autograd.grad(
        sum(normed(x, w, 4, 1e-2).sin().sum() for x, w in zip(doubles[:3], weights, strict=True)),
        doubles,
    )
    for gradient, expected in zip(gradients, exact, strict=True):
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-6)


def good():
    """Return the arguments of a valid call: 2 and 1 heads of 8."""
    return make_inputs(m=3, num_q_heads=2, num_kv_heads=1, head_dim=8)


X = torch.zeros(3, 32, dtype=torch.bfloat16)
BAD = {
    "rank": ({"q": X[0]}, r"q.shape: found \(32,\), needed 2 dimensions"),
    "dtype": ({"q": X[:, :16].int()}, "q.dtype: found torch.int32, needed torch.bfloat16 or"),
    "other dtype": ({"k": X[:, :8].float()}, "k.dtype: found torch.float32, needed torch.bfloat16"),
    "stride": ({"v": X[:, ::4]}, r"v.stride\(-1\): found 4 .*, needed 1"),
    "rows": ({"k": X[:2, :8]}, r"k.shape\[0\]: found 2, needed 3, the number of rows of q"),
    "v rows": ({"v": X[:2, :8]}, r"v.shape\[0\]: found 2, needed 3, the number of rows of q"),
    "width": ({"q": X[:, :12]}, r"q.shape\[1\]: found 12, needed a positive multiple of 8"),
    "no head": ({"q": X[:, :0]}, r"q.shape\[1\]: found 0, needed a positive multiple of 8"),
    "v heads": ({"v": X[:, :16]}, r"v.shape: found \(3, 16\), needed 1 heads, as k"),
    "3-D width": ({"q": X.view(3, 2, 16)}, r"q.shape: found \(3, 2, 16\), .* head_dim = 8"),
    "3-D stride": ({"q": X.view(3, 2, 16)[..., :8]}, r"q.stride\(1\): found 16, needed 8: heads"),
    "weight": ({"q_weight": X[0, :16]}, r"q_weight.shape\[0\]: found 16, needed head_dim = 8"),
    "weight rank": (
        {"k_weight": X[:1, :8]},
        r"k_weight.shape: found \(1, 8\), needed 1 dimensions",
    ),
    "device": ({"v": X[:, :8].to("meta")}, "v.device: found meta, needed cpu, as q"),
    "head_dim": ({"head_dim": 0}, "head_dim: found 0, needed a positive number"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_argument_is_refused_with_what_was_found_and_needed(change, message):
    """Nothing is cast, cut or copied to make a wrong call fit."""
    with pytest.raises(InputError, match=message):
        qkv_rms_norm(**good() | change)

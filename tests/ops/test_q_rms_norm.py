"""q_rms_norm: against float64, one rounding, a plain weight."""

import pytest
import torch

from hwfuse import InputError
from hwfuse.ops.q_rms_norm import COMPARE, make_inputs
from hwfuse.testing.compare import compare
from hwfuse_reference.torch_ops.q_rms_norm import q_rms_norm


def normed(x, weight, head_dim, eps=1e-6):
    """Return the norm of every head vector in float64."""
    heads = x.double().reshape(x.shape[0], -1, head_dim)
    y = heads / torch.sqrt((heads * heads).mean(dim=2, keepdim=True) + eps)
    return (y * weight.double()).reshape(x.shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("head_dim", "num_q_heads"), [(256, 8), (512, 8), (64, 3)])
def test_heads_agree_with_float64_rounded_once(head_dim, num_q_heads, dtype):
    """Rows may be slices of wider ones."""
    inputs = make_inputs(m=9, num_q_heads=num_q_heads, head_dim=head_dim, dtype=dtype, row_pad=24)
    exact = normed(inputs["q"], inputs["q_weight"], head_dim).to(dtype)
    assert compare(COMPARE["q"], q_rms_norm(**inputs), exact, {}) is None


def test_comparator_refuses_a_second_rounding_and_one_plus_the_weight():
    """The norm is not rounded before it is weighted; the weight is w, as it is in Gemma4."""
    inputs = make_inputs(m=37, num_q_heads=2, head_dim=64)
    q, weight = inputs["q"], inputs["q_weight"].double()
    ones = torch.ones(64)
    twice = normed(normed(q, ones, 64).bfloat16(), weight, 64, eps=0.0).bfloat16()
    result = q_rms_norm(**inputs)
    for wrong in (twice, normed(q, 1 + weight, 64).bfloat16()):
        assert "ulps" in compare(COMPARE["q"], wrong, result, {})


@pytest.mark.parametrize("m", [0, 1, 3])
def test_three_dimensions_give_the_same_numbers_in_three_dimensions(m):
    """``[M, heads, D]`` is the same memory as ``[M, heads * D]``."""
    inputs = make_inputs(m=m, num_q_heads=4, head_dim=64)
    flat = q_rms_norm(**inputs)
    result = q_rms_norm(**inputs | {"q": inputs["q"].unflatten(1, (4, 64))})
    assert (result.shape, result.is_contiguous()) == ((m, 4, 64), True)
    assert torch.equal(result.flatten(1), flat)


X = torch.zeros(3, 32, dtype=torch.bfloat16)
BAD = {
    "dtype": ({"q": X.int()}, "q.dtype: found torch.int32, needed torch.bfloat16 or"),
    "stride": ({"q": X[:, ::4]}, r"q.stride\(-1\): found 4 .*, needed 1"),
    "width": ({"q": X[:, :12]}, r"q.shape\[1\]: found 12, needed a positive multiple of 8"),
    "weight": ({"q_weight": X[0, :16]}, r"q_weight.shape\[0\]: found 16, needed head_dim = 8"),
    "device": ({"q_weight": X[0, :8].to("meta")}, "q_weight.device: found meta, needed cpu, as q"),
    "head_dim": ({"head_dim": 0}, "head_dim: found 0, needed a positive number"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_argument_is_refused_with_what_was_found_and_needed(change, message):
    """Nothing is cast, cut or copied to make a wrong call fit."""
    with pytest.raises(InputError, match=message):
        q_rms_norm(**make_inputs(m=3, num_q_heads=2, head_dim=8) | change)

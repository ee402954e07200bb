"""fused_qkvbfg: against the eight projections one by one, and the one rounding between them."""

import pytest
import torch

from hwfuse import InputError
from hwfuse.ops.fused_qkvbfg import COMPARE, make_inputs
from hwfuse.testing.compare import compare
from hwfuse_reference.torch_ops.fused_qkvbfg import fused_qkvbfg

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
SIZES = {"hidden_size": 96, "num_heads": 3, "head_dim": 16}
NAMES = ("q", "k", "v", "b", "f_a", "g_a")


def eight_weights(num_heads=3, head_dim=16, hidden_size=96, seed=0):
    """Return small whole numbers: every product and sum of theirs is exact in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    p = num_heads * head_dim
    rows = dict(zip(NAMES, (p, p, p, num_heads, head_dim, head_dim), strict=True))
    shapes = {name: (n, hidden_size) for name, n in rows.items()}
    shapes |= {"f_b": (p, head_dim), "g_b": (p, head_dim)}
    density = {name: 3 / shape[1] for name, shape in shapes.items()}
    return {
        name: torch.bernoulli(torch.full(shape, density[name]), generator=generator)
        * torch.randint(-2, 3, shape, generator=generator)
        for name, shape in shapes.items()
    }


def from_low_ranks(low_ranks, w_fg):
    """Return the gates in float64 from given low ranks."""
    head_dim = w_fg.shape[2]
    f_a, g_a = low_ranks[:, -2 * head_dim : -head_dim], low_ranks[:, -head_dim:]
    return torch.stack([f_a.double() @ w_fg[0].double().t(), g_a.double() @ w_fg[1].double().t()])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("m", [0, 1, 5])
def test_columns_and_gates_are_those_of_eight_separate_projections(m, dtype):
    """Whole numbers are exact: the order of rows, slots and columns is proved, bit for bit."""
    weights = eight_weights()
    x = torch.randint(-1, 2, (m, 96), generator=torch.Generator().manual_seed(1)).double()
    separate = {name: x @ weights[name].double().t() for name in NAMES}
    forget = separate["f_a"] @ weights["f_b"].double().t()
    output = separate["g_a"] @ weights["g_b"].double().t()
    w_qkvbfg = torch.cat([weights[name] for name in NAMES]).to(dtype)
    w_fg = torch.stack([weights["f_b"], weights["g_b"]]).to(dtype)
    qkvbfg, gates = fused_qkvbfg(x.to(dtype), w_qkvbfg, w_fg)
    assert (qkvbfg.dtype, gates.dtype, gates.shape) == (dtype, dtype, (2, m, 48))
    assert torch.equal(qkvbfg.double(), torch.cat(list(separate.values()), dim=1))
    assert torch.equal(gates.double(), torch.stack([forget, output]))
    assert m == 0 or not torch.equal(forget, output)


@pytest.mark.parametrize("dtype", FLOATS)
def test_each_product_agrees_with_float64_rounded_once(dtype):
    """Half a last place of the result, and float32 noise of the sum."""
    inputs = make_inputs(m=9, **SIZES, dtype=dtype)
    qkvbfg, gates = fused_qkvbfg(**inputs)
    exact = inputs["x"].double() @ inputs["w_qkvbfg"].double().t()
    half = torch.finfo(dtype).eps / 2
    for found, wanted in ((qkvbfg, exact), (gates, from_low_ranks(qkvbfg, inputs["w_fg"]))):
        assert ((found.double() - wanted).abs() <= half * wanted.abs() + 2e-6).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gates_come_from_the_rounded_low_ranks(dtype):
    """As separate layers compute them: what the first product lost to rounding stays lost."""
    inputs = make_inputs(m=9, **SIZES, dtype=dtype)
    _, gates = fused_qkvbfg(**inputs)
    exact = inputs["x"].double() @ inputs["w_qkvbfg"].double().t()
    rounded, unrounded = (
        from_low_ranks(low_ranks, inputs["w_fg"]).to(dtype)
        for low_ranks in (exact.to(dtype), exact)
    )
    assert (gates != rounded).float().mean() < 0.01
    assert (gates != unrounded).float().mean() > 0.1


def split_k(inputs):
    """Return the first product as the sum of four partial products, each rounded."""
    x, w = inputs["x"].double(), inputs["w_qkvbfg"].double()
    partial = [(x[:, i::4] @ w[:, i::4].t()).bfloat16().double() for i in range(4)]
    return sum(partial).bfloat16()


def wrong_gates(inputs, what):
    """Return gates with one mistake."""
    exact = inputs["x"].double() @ inputs["w_qkvbfg"].double().t()
    if what == "swapped":
        return from_low_ranks(exact.bfloat16(), inputs["w_fg"].flip(0)).bfloat16()
    if what == "slots swapped":
        return from_low_ranks(exact.bfloat16(), inputs["w_fg"]).bfloat16().flip(0)
    return from_low_ranks(exact, inputs["w_fg"]).bfloat16()


@pytest.mark.parametrize("what", ["swapped", "slots swapped", "low ranks not rounded"])
def test_comparator_refuses_wrong_gates(what):
    """SGLang's tolerance, rtol 1e-2 and atol 4e-3, would let the missing rounding pass."""
    inputs = make_inputs(m=37, hidden_size=256, num_heads=2, head_dim=32)
    _, gates = fused_qkvbfg(**inputs)
    exact = inputs["x"].double() @ inputs["w_qkvbfg"].double().t()
    right = from_low_ranks(exact.bfloat16(), inputs["w_fg"]).bfloat16()
    assert compare(COMPARE["gates"], right, gates, {}) is None
    assert "Frobenius" in compare(COMPARE["gates"], wrong_gates(inputs, what), gates, {})


def test_comparator_refuses_rounded_partial_sums_and_one_lost_column():
    """The sum over the channels is in float32 to its end."""
    inputs = make_inputs(m=37, hidden_size=256, num_heads=2, head_dim=32)
    qkvbfg, _ = fused_qkvbfg(**inputs)
    right = (inputs["x"].double() @ inputs["w_qkvbfg"].double().t()).bfloat16()
    lost = right.clone()
    lost[:, 3 * 64] = 0  # beta of the first head
    assert compare(COMPARE["qkvbfg"], right, qkvbfg, {}) is None
    for wrong in (split_k(inputs), lost):
        assert "Frobenius" in compare(COMPARE["qkvbfg"], wrong, qkvbfg, {})


def test_strided_tensors_give_what_their_copies_give():
    """Rows of x and of the weights may be slices."""
    inputs = make_inputs(m=5, **SIZES)
    wide = {name: torch.nn.functional.pad(t, (3, 8))[..., 3:-8] for name, t in inputs.items()}
    assert not any(t.is_contiguous() for t in wide.values())
    for found, expected in zip(fused_qkvbfg(**wide), fused_qkvbfg(**inputs), strict=True):
        assert torch.equal(found, expected)
        assert found.is_contiguous()


def test_gradient_agrees_with_that_of_separate_layers_in_float64():
    """The low ranks receive the gates' gradient and their own."""
    inputs = make_inputs(m=4, hidden_size=12, num_heads=2, head_dim=4, dtype=torch.float32)
    leaves = [t.requires_grad_() for t in inputs.values()]
    found = torch.autograd.grad(sum(r.sin().sum() for r in fused_qkvbfg(*leaves)), leaves)
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    qkvbfg = doubles[0] @ doubles[1].t()
    loss = qkvbfg.sin().sum() + from_low_ranks(qkvbfg, doubles[2]).sin().sum()
    for gradient, expected in zip(found, torch.autograd.grad(loss, doubles), strict=True):
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-5)


X, W, FG = torch.zeros(3, 32), torch.zeros(34, 32), torch.zeros(2, 8, 4)
BAD = {
    "rank": ({"x": X[0]}, r"x.shape: found \(32,\), needed 2 dimensions"),
    "dtype": ({"x": X.int()}, "x.dtype: found torch.int32, needed torch.bfloat16 or"),
    "other dtype": ({"w_fg": FG.half()}, "w_fg.dtype: found torch.float16, needed torch.float32"),
    "stride": ({"x": X[:, ::2]}, r"x.stride\(-1\): found 2 .*, needed 1"),
    "no channels": ({"x": X[:, :0]}, r"x.shape\[1\]: found 0, needed at least 1"),
    "channels": (
        {"w_qkvbfg": W[:, :31]},
        r"w_qkvbfg.shape\[1\]: found 31, needed 32, the width of x",
    ),
    "one gate": ({"w_fg": FG[:1]}, r"w_fg.shape\[0\]: found 1, needed 2: forget gate, output gate"),
    "low rank": ({"w_fg": FG[..., :0]}, r"w_fg.shape\[2\]: found 0, needed head_dim, at least 1"),
    "heads": (
        {"w_fg": FG[:, :6]},
        r"w_fg.shape\[1\]: found 6, needed a positive multiple of head_dim = 4",
    ),
    "no head": ({"w_fg": FG[:, :0]}, r"w_fg.shape\[1\]: found 0, needed a positive multiple"),
    "low ranks sliced by tensor parallelism": (
        {"w_qkvbfg": W[:30]},
        r"w_qkvbfg.shape\[0\]: found 30, needed 34 = 3 \* 8 \+ 2 \+ 2 \* 4",
    ),
    "device": ({"w_fg": FG.to("meta")}, "w_fg.device: found meta, needed cpu, as x"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_argument_is_refused_with_what_was_found_and_needed(change, message):
    """Nothing is cast, cut or copied to make a wrong call fit."""
    with pytest.raises(InputError, match=message):
        fused_qkvbfg(**{"x": X, "w_qkvbfg": W, "w_fg": FG} | change)

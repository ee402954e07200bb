"""The Triton kernels of the head norms, in the corrected interpreter."""

from importlib import import_module

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("numpy", reason="Triton's interpreter computes with numpy")

from hwfuse import InputError, _state, _variants
from hwfuse.testing import compare
from hwfuse.testing._interpreter import interpreted
from hwfuse_triton import head_norms as shared

OPS = ["qkv_rms_norm", "qkv_rms_norm_", "q_keqv_rms_norm", "q_rms_norm", "q_rms_norm_"]


def spec_of(op):
    """Return the op's spec."""
    return import_module(f"hwfuse.ops.{op}")


def inputs(op, *, num_q_heads, num_kv_heads, **keywords):
    """Make a call's arguments; q_rms_norm has no key and value heads."""
    if not op.startswith("q_rms_norm"):
        keywords["num_kv_heads"] = num_kv_heads
    return spec_of(op).make_inputs(num_q_heads=num_q_heads, **keywords)


def results(op, function, arguments):
    """Call a function; return what it gave, or the arguments that it wrote into."""
    result = function(**arguments)
    if op.endswith("_"):
        assert result is None
        return [arguments[name] for name in spec_of(op).MUTATES]
    return [result] if isinstance(result, torch.Tensor) else list(result)


def assert_right(op, arguments, wave=32):
    """Compare with the reference as parity does; return what the kernel gave."""
    copies = {k: v.clone() if torch.is_tensor(v) else v for k, v in arguments.items()}
    reference = getattr(import_module(f"hwfuse_reference.torch_ops.{op}"), op)
    expected = results(op, reference, copies)
    with interpreted():
        found = results(op, lambda **a: getattr(shared, op)(**a, wave=wave), arguments)
    for (_, comparator), x, y in zip(spec_of(op).COMPARE.items(), found, expected, strict=True):
        assert compare.compare(comparator, x, y, {}) is None
    return found


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("heads", "head_dim"), [((5, 3), 96), ((2, 3), 320), ((7, 1), 1)])
def test_norms_of_odd_heads_mask_the_rest(heads, head_dim, op):
    """No power of two, no whole number of q heads per kv head, more kv heads than q heads."""
    assert_right(
        op, inputs(op, m=4, num_q_heads=heads[0], num_kv_heads=heads[1], head_dim=head_dim)
    )


@pytest.mark.parametrize("op", OPS)
def test_norms_in_large_tiles_are_right(op, monkeypatch):
    """Past the threshold: other tiles, the same results to the bit."""
    arguments = inputs(op, m=3, num_q_heads=5, num_kv_heads=2, head_dim=512)
    copies = {k: v.clone() if torch.is_tensor(v) else v for k, v in arguments.items()}
    small = assert_right(op, arguments)
    monkeypatch.setattr(shared, "SMALL_ELEMENTS", 0)
    large = assert_right(op, copies)
    assert all(map(torch.equal, small, large))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("row_pad", [1, 8])
def test_norms_of_strided_rows_leave_what_lies_between(row_pad, op):
    """The in-place forms write their columns only, whatever the factor of the stride."""
    arguments = inputs(op, m=3, num_q_heads=4, num_kv_heads=2, head_dim=64, row_pad=row_pad)
    storage = arguments["q"].untyped_storage()
    between = torch.tensor([], dtype=torch.int16).set_(storage).view(3, -1)[:, -row_pad:]
    before = between.clone()
    assert_right(op, arguments)
    assert torch.equal(between, before)


def test_value_norm_does_not_know_the_key_weight():
    """With k = v the value comes from the raw projection, never from the weighted key."""
    arguments = inputs("q_keqv_rms_norm", m=2, num_q_heads=2, num_kv_heads=1, head_dim=64)
    _, _, v = assert_right("q_keqv_rms_norm", arguments)
    arguments["k_weight"] = torch.full((64,), float("nan"), dtype=torch.bfloat16)
    with interpreted():
        _, k, again = shared.q_keqv_rms_norm(**arguments)
    assert k.isnan().all()
    assert torch.equal(v, again)


def test_norms_of_separate_heads_and_other_weights_are_right():
    """Three dimensions, weights in float32, as wide as AMD's wavefront."""
    arguments = inputs("qkv_rms_norm", m=3, num_q_heads=4, num_kv_heads=2, head_dim=64)
    arguments |= {name: arguments[name].unflatten(1, (-1, 64)) for name in "qkv"}
    arguments["q_weight"] = arguments["q_weight"].float()
    q, k, _ = assert_right("qkv_rms_norm", arguments, wave=64)
    assert (q.shape, k.shape) == ((3, 4, 64), (3, 2, 64))


def test_norm_of_a_row_beyond_two_to_the_31_elements_reads_that_row():
    """Offsets are computed in 64 bits.  The storage is reserved, its pages are never touched."""
    stride = 2**30 + 8
    q = torch.empty(2 * stride + 128, dtype=torch.float16).as_strided((3, 128), (stride, 1))
    q.copy_(torch.randn(3, 128))
    weight = torch.ones(64, dtype=torch.float16)
    with interpreted():
        found = shared.q_rms_norm(q, weight, head_dim=64)
        wanted = shared.q_rms_norm(q.contiguous(), weight, head_dim=64)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("op", OPS)
def test_norms_without_rows_launch_nothing(op):
    """M = 0: an accelerator refuses an empty grid, so it must never be asked."""
    arguments = inputs(op, m=0, num_q_heads=4, num_kv_heads=2, head_dim=64)
    assert results(op, getattr(shared, op), arguments)[0].shape == (0, 256)


@pytest.mark.parametrize("op", OPS)
def test_norms_of_more_heads_than_can_be_numbered_are_refused(op, monkeypatch):
    """Heads are numbered in 32 bits over all rows; beyond that there is an error."""
    monkeypatch.setattr(shared, "_MAX_HEADS", 11)
    arguments = inputs(op, m=3, num_q_heads=4, num_kv_heads=2, head_dim=64)
    with pytest.raises(InputError, match=r"q.shape\[0\]: found 3, needed at most [12] rows"):
        results(op, getattr(shared, op), arguments)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["cuda", "rocm"])
def test_tiles_change_where_the_variants_say(backend, op):
    """The threshold that `explain` shows is the one that runs."""
    variants = _variants.read(_state.registry().implementations(op)[f"{backend}/triton"])
    heads = {"num_q_heads": 1, "num_kv_heads": 0, "head_dim": 1}
    for m, name in ((shared.SMALL_ELEMENTS, "small tiles"), (2**21 + 1, "large tiles")):
        assert [n for n, fact in variants.items() if fact.holds({"m": m, **heads})] == [name]

"""The Triton kernels of the fp8_group_quant family, in the corrected interpreter."""

import importlib

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("numpy", reason="Triton's interpreter computes with numpy")

from hwfuse import InputError
from hwfuse.testing import compare
from hwfuse.testing._interpreter import interpreted
from hwfuse_triton import _fp8, group_quant, long_rows, norm_group_quant

FN, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz
PLAIN = ["fp8_group_quant", "flatten_fp8_group_quant", "silu_mul_fp8_group_quant"]
NORMS = [
    "rms_norm_fp8_group_quant",
    "rms_norm_and_fp8_group_quant",
    "add_rms_norm_fp8_group_quant",
    "add_rms_norm_and_fp8_group_quant",
]


def spec_of(op):
    """Return the module that specifies an op."""
    return importlib.import_module(f"hwfuse.ops.{op}")


def run(op, *args, **kwargs):
    """Call the kernel in the interpreter."""
    with interpreted():
        return getattr(group_quant if op in PLAIN else norm_group_quant, op)(*args, **kwargs)


def assert_right(op, found, arguments):
    """Compare with the reference as the op's spec says, strides and shapes too."""
    reference = importlib.import_module(f"hwfuse_reference.torch_ops.{op}")
    expected = getattr(reference, op)(**arguments)
    outputs = spec_of(op).COMPARE.items()
    for (name, comparator), one, other in zip(outputs, found, expected, strict=True):
        assert (one.shape, one.stride()) == (other.shape, other.stride())
        assert compare.compare(comparator, one, other, {}) is None, name


def bytes_of(packed):
    """Return the bytes of packed scales, ``[M, 4 * ceil(G/4)]``."""
    return torch.stack([(packed >> (8 * i)) & 0xFF for i in range(4)], 2).flatten(1)


@pytest.mark.parametrize("fp8", [FN, FNUZ])
@pytest.mark.parametrize("op", PLAIN + NORMS)
def test_op_on_rows_at_odd_addresses_keeps_its_contract(op, fp8):
    """NaN, infinity, zeros and outliers; a group size that is no power of two; rows far apart."""
    sizes = {"num_heads": 3, "head_dim": 192, "is_heads_first": True} if "flatten" in op else {}
    arguments = spec_of(op).make_inputs(
        m=9,
        group_size=96,
        scale_layout="column_tma",
        scale_format="ue8m0_packed",
        fp8=fp8,
        row_pad=3,
        **sizes or {"k": 480},
    )
    assert_right(op, run(op, **arguments), arguments)


@pytest.mark.parametrize("scale_format", ["fp32", "ue8m0"])
@pytest.mark.parametrize(("fp8", "qmax"), [(FN, 448.0), (FNUZ, 240.0)])
def test_scale_of_qmax_times_a_power_of_two_is_that_power(fp8, qmax, scale_format):
    """The division is exact, so no power of two is rounded up to the next one."""
    powers = torch.arange(-30, 31).float().exp2()
    x = torch.zeros(61, 128)
    x[:, 5] = qmax * powers
    _, scale = run("fp8_group_quant", x, scale_format=scale_format, dtype=fp8)
    assert torch.equal(scale[:, 0], powers)


def test_power_of_two_scale_of_the_next_number_rounds_up():
    """One ulp more than 448 needs the scale 2."""
    x = torch.zeros(1, 128)
    x[0, 0] = torch.nextafter(torch.tensor(448.0), torch.tensor(1e9))
    _, scale = run("fp8_group_quant", x, scale_format="ue8m0", dtype=FN)
    assert scale.item() == 2.0


@pytest.mark.parametrize("scale_format", ["fp32", "ue8m0"])
def test_nan_or_infinity_changes_its_own_group_only(scale_format):
    """NaN: scale and codes NaN.  Infinity: scale infinite, finite codes 0, its own NaN."""
    x = torch.ones(1, 384)
    x[0, 3], x[0, 200] = float("nan"), -float("inf")
    q, scale = run("fp8_group_quant", x, scale_format=scale_format, dtype=FN)
    codes = q.float().view(3, 128)
    assert scale[0, 0].isnan()
    assert codes[0].isnan().all()
    assert scale[0, 1] == float("inf")
    assert codes[1].isnan().nonzero().tolist() == [[72]]
    assert codes[1].nan_to_num(0.0).eq(0.0).all()
    assert scale[0, 2].isfinite()
    assert codes[2].isfinite().all()


def test_packed_exponents_have_zero_padding_and_255_for_what_is_not_finite(monkeypatch):
    """Bytes past the last group are written, whatever the memory held."""

    def poisoned(*args):
        return empty(*args).view(torch.uint8).fill_(0xAB).view(args[2])

    empty = _fp8.empty
    monkeypatch.setattr(_fp8, "empty", poisoned)
    x = torch.full((5, 640), 448.0)
    x[1, 0], x[2, 130] = float("nan"), float("inf")
    options = {"scale_layout": "column_tma", "scale_format": "ue8m0_packed", "dtype": FN}
    for op, more in (("fp8_group_quant", ()), ("rms_norm_fp8_group_quant", (x[0],))):
        _, scale = run(op, x, *more, **options)
        assert scale.stride() == (1, 8)
        found = bytes_of(scale)
        assert found[:, 5:].eq(0).all()
        assert found[0, :5].ne(0).all()
        assert found[1, 0] == found[2, 1] == 255


def test_groups_of_zeros_have_the_floor_as_scale():
    """A norm of zeros is zeros, too: no division by zero."""
    x, floor = torch.zeros(3, 256), torch.tensor(1e-10) / 448
    for op, more in (("fp8_group_quant", ()), ("rms_norm_fp8_group_quant", (x[0],))):
        q, scale = run(op, x, *more, dtype=FN)
        assert q.float().eq(0).all()
        assert scale.eq(floor).all()


@pytest.mark.parametrize(("fp8", "qmax"), [(FN, 448.0), (FNUZ, 240.0)])
def test_rounding_in_software_gives_the_bits_of_a_cast(monkeypatch, fp8, qmax):
    """Where no instruction rounds: all magnitudes, the middles between codes, -0 and NaN."""
    monkeypatch.setattr(_fp8, "rounds", lambda *_: False)
    codes = torch.arange(256, dtype=torch.uint8).view(fp8).float().nan_to_num(0.0)
    middles = (codes[1:127] + codes[:126]) / 2
    some = torch.randint(0, 0x7F800000, (1024,), generator=torch.Generator().manual_seed(0))
    any_size = some.int().view(torch.float32).clamp(max=qmax)
    values = torch.cat([codes, middles, -middles, any_size, -any_size, torch.tensor([-0.0, 1.0])])
    x = torch.nn.functional.pad(values, (0, -len(values) % 127)).view(-1, 127)
    x = torch.cat([torch.full((len(x), 1), qmax), x], 1)  # so that the scale is 1
    q, scale = run("fp8_group_quant", x, dtype=fp8)
    assert scale.eq(1.0).all()
    assert torch.equal(q.view(torch.uint8), x.to(fp8).view(torch.uint8))


@pytest.mark.parametrize("op", NORMS)
@pytest.mark.parametrize("group_size", [48, 384])
def test_row_too_long_for_registers_is_taken_in_pieces(monkeypatch, op, group_size):
    """Pieces of several groups, and groups of several pieces."""
    monkeypatch.setattr(long_rows, "LONGEST", 256)
    monkeypatch.setattr(long_rows, "_PIECE", 128)
    long_rows.launch.cache_clear()
    arguments = spec_of(op).make_inputs(m=9, k=1152, group_size=group_size, row_pad=3, fp8=FN)
    assert_right(op, run(op, **arguments), arguments)
    long_rows.launch.cache_clear()


@pytest.mark.parametrize("op", PLAIN)
def test_group_too_long_for_registers_is_taken_in_pieces(monkeypatch, op):
    """Also where heads lie apart, and with gate and up."""
    monkeypatch.setattr(long_rows, "LONGEST", 256)
    monkeypatch.setattr(long_rows, "_PIECE", 128)
    long_rows.launch.cache_clear()
    sizes = {"num_heads": 3, "head_dim": 640, "is_heads_first": True} if "flatten" in op else {}
    arguments = spec_of(op).make_inputs(m=3, group_size=320, fp8=FN, **sizes or {"k": 960})
    assert_right(op, run(op, **arguments), arguments)
    long_rows.launch.cache_clear()


@pytest.mark.parametrize("op", ["fp8_group_quant", "add_rms_norm_fp8_group_quant"])
def test_row_beyond_two_to_the_31_elements_is_read_there(op):
    """Offsets are computed in 64 bits.  The storage is reserved, its pages are never touched."""
    stride = 2**30 + 8
    arguments = spec_of(op).make_inputs(m=3, k=256, fp8=FN, dtype=torch.float16)
    for name, offset in (("x", 0), ("residual", 512)):
        if name in arguments:
            storage = torch.empty(2 * stride + 1024, dtype=torch.float16)
            far = storage[offset:].as_strided((3, 256), (stride, 1))
            arguments[name] = far.copy_(arguments[name])
    assert_right(op, run(op, **arguments), arguments)


@pytest.mark.parametrize("op", PLAIN + NORMS)
def test_call_without_rows_launches_nothing(op):
    """M = 0: an accelerator refuses an empty grid, so it must never be asked."""
    arguments = spec_of(op).make_inputs(m=0, scale_layout="column_tma", fp8=FN)
    module = group_quant if op in PLAIN else norm_group_quant
    found = getattr(module, op)(**arguments)  # would raise here: no driver, no interpreter
    assert all(output.shape[0] == 0 for output in found)


def test_more_groups_than_can_be_numbered_are_refused(monkeypatch):
    """Groups are numbered in 32 bits over all rows; beyond there is an error, no wrong code."""
    monkeypatch.setattr(group_quant, "_MOST_GROUPS", 100)
    with pytest.raises(InputError, match=r"x.shape\[0\]: found 4, needed at most 3 rows"):
        run("fp8_group_quant", torch.ones(4, 4096), dtype=FN)


@pytest.mark.parametrize("op", PLAIN + NORMS)
def test_declared_variants_have_the_thresholds_of_the_kernels(op):
    """What `explain` says is decided by the numbers that the wrappers compare with."""
    for backend in ("cuda", "rocm"):
        file = importlib.import_module(f"hwfuse_{backend}.triton_ops.{op}")
        text = " ".join(file.VARIANTS.values())
        assert f"> {long_rows.LONGEST}" in text
        assert (f"<= {norm_group_quant.FEW_ELEMENTS}" in text) == (
            op in NORMS and backend == "cuda"
        )

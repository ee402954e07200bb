"""fp8_group_quant: scales, codes, formats and layouts, against arithmetic done by hand."""

import math

import pytest
import torch

from hwfuse import InputError, layouts
from hwfuse.ops.fp8_group_quant import make_inputs
from hwfuse_reference.torch_ops.fp8_group_quant import fp8_group_quant

FN, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz
QMAX = {FN: 448.0, FNUZ: 240.0}
PAIRS = [(f, y) for f in ("fp32", "ue8m0") for y in ("row", "column", "column_tma")]
PAIRS.append(("ue8m0_packed", "column_tma"))
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def fp32(x):
    """Round a Python number to float32; one operation on float32 numbers is then exact."""
    return torch.tensor(x, dtype=torch.float64).float().item()


def nearest_code(t, dtype):
    """Return the finite fp8 number nearest to t, of two the one with the even code."""
    codes = torch.arange(128, dtype=torch.uint8)
    values = codes.view(dtype).double().tolist()
    numbers = [(v, c) for c, v in enumerate(values) if math.isfinite(v)]
    size, _ = min(numbers, key=lambda entry: (abs(entry[0] - abs(t)), entry[1] % 2))
    return math.copysign(size, t)


def power_above(s):
    """Return the smallest power of two that is not below s."""
    mantissa, exponent = math.frexp(s)
    return 2.0 ** (exponent - 1 if mantissa == 0.5 else exponent)


def unpack(packed, num_groups):
    """Return the powers of two that a packed scale means."""
    rows = packed.tolist()
    scales = [
        2.0 ** ((word >> 8 * b & 0xFF) - 127) for row in rows for word in row for b in range(4)
    ]
    return torch.tensor(scales).view(len(rows), 4 * packed.shape[1])[:, :num_groups]


@pytest.mark.parametrize("fp8", QMAX)
@pytest.mark.parametrize("scale_format", ["fp32", "ue8m0"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_scale_and_codes_of_each_element_follow_the_formula(dtype, scale_format, fp8):
    """Each step of s = max(amax, 1e-10) / QMAX and q = fp8(clamp(x * (1 / s))) is in float32."""
    x = make_inputs(m=8, k=64, group_size=32, dtype=dtype)["x"][[0, 1, 4, 5, 6]]
    q, scale = fp8_group_quant(x, group_size=32, scale_format=scale_format, dtype=fp8)
    for m, row in enumerate(x.double().tolist()):
        for g in range(2):
            group = row[32 * g : 32 * g + 32]
            s = fp32(max(fp32(1e-10), *map(abs, group)) / QMAX[fp8])
            s = power_above(s) if scale_format == "ue8m0" else s
            assert scale[m, g].item() == s
            limit, inverse = QMAX[fp8], fp32(1 / s)
            scaled = [min(max(fp32(v * inverse), -limit), limit) for v in group]
            expected = [nearest_code(t, fp8) for t in scaled]
            assert q[m, 32 * g : 32 * g + 32].tolist() == expected


@pytest.mark.parametrize("fp8", QMAX)
def test_elements_on_a_tie_are_multiplied_by_the_reciprocal(fp8):
    """The product x * (1 / s) and the quotient x / s round to different codes on rare ties."""
    x = torch.rand(64, 128, generator=torch.Generator().manual_seed(0))
    x[:, 0] += 1
    s = x[:, :1] / torch.tensor(QMAX[fp8])
    x[:, 1:9] = s * torch.arange(17, 33, 2)  # halfway between two codes each
    q, _ = fp8_group_quant(x, dtype=fp8)
    products, quotients = (
        [nearest_code(t, fp8) for t in scaled[:, 1:9].flatten().tolist()]
        for scaled in (x * (1 / s), x / s)
    )
    assert q[:, 1:9].flatten().tolist() == products
    assert products != quotients


@pytest.mark.parametrize("fp8", QMAX)
@pytest.mark.parametrize("scale_format", ["fp32", "ue8m0"])
@pytest.mark.parametrize(("m", "k"), [(1, 128), (31, 384), (4, 7168)])
def test_dequantised_element_is_within_half_a_code(m, k, scale_format, fp8):
    """|x - q * s| <= max(|x| / 16, s / 1024), s / 2048 for fnuz, and a last bit of float32."""
    x = (
        torch.randn(m, k, generator=torch.Generator().manual_seed(k))
        * 2.0 ** torch.arange(m)[:, None]
    )
    q, scale = fp8_group_quant(x, scale_format=scale_format, dtype=fp8)
    s = scale.double().repeat_interleave(128, dim=1)
    bound = torch.maximum(x.double().abs() / 16, s / (1024 if fp8 is FN else 2048))
    assert ((x.double() - q.double() * s).abs() <= bound + x.double().abs() * 2**-23).all()


@pytest.mark.parametrize(("scale_format", "scale_layout"), PAIRS)
@pytest.mark.parametrize("fp8", QMAX)
@pytest.mark.parametrize("m", [0, 1, 2, 3, 4, 5, 31])
def test_layout_changes_strides_and_nothing_else(m, fp8, scale_format, scale_layout):
    """Codes and logical scales are those of the row layout; the strides are the layout's."""
    x = make_inputs(m=m, k=384, row_pad=8)["x"]
    options = {"scale_format": scale_format, "scale_layout": scale_layout, "dtype": fp8}
    q, scale = fp8_group_quant(x, **options)
    plain_format = "fp32" if scale_format == "fp32" else "ue8m0"
    expected_q, expected = fp8_group_quant(x, scale_format=plain_format, dtype=fp8)
    assert q.dtype == fp8
    assert q.is_contiguous()
    assert torch.equal(q.view(torch.uint8), expected_q.view(torch.uint8))
    assert layouts.matches(scale, scale_layout)
    if scale_format == "ue8m0_packed":
        finite = expected.isfinite()
        assert torch.equal(unpack(scale, 3)[finite], expected[finite])
    else:
        assert torch.equal(scale.nan_to_num(nan=-1), expected.nan_to_num(nan=-1))


@pytest.mark.parametrize("num_groups", [1, 3, 4, 5])
def test_packed_word_holds_four_exponents_little_endian_and_zero_padding(num_groups):
    """Group 4i + b is byte b of word i; bytes past the last group are 0."""
    x = torch.zeros(2, 128 * num_groups)
    x[:, ::128] = 448 * 2.0 ** torch.arange(num_groups)
    x[1] *= 2.0
    _, packed = fp8_group_quant(x, scale_format="ue8m0_packed", scale_layout="column_tma", dtype=FN)
    width = (num_groups + 3) // 4
    assert (packed.dtype, packed.shape) == (torch.int32, (2, width))
    for m in range(2):
        exponents = [127 + m + g for g in range(num_groups)] + [0] * (4 * width - num_groups)
        words = [sum(exponents[4 * i + b] << 8 * b for b in range(4)) for i in range(width)]
        assert [word & 0xFFFFFFFF for word in packed[m].tolist()] == words


@pytest.mark.parametrize("fp8", QMAX)
def test_power_of_two_scale_is_exact_at_a_power_and_doubles_one_ulp_above(fp8):
    """Through log2 an exact power can move up, and the number after a power can stay."""
    powers = 2.0 ** torch.arange(-30, 100, dtype=torch.float32)
    x = torch.zeros(len(powers), 256)
    x[:, 0] = -QMAX[fp8] * powers
    x[:, 128] = torch.nextafter(QMAX[fp8] * powers, torch.tensor(math.inf))
    above = torch.nextafter(powers, torch.tensor(math.inf))
    x[:, 129] = QMAX[fp8] * above  # s itself is then more than the power
    _, scale = fp8_group_quant(x, scale_format="ue8m0", dtype=fp8)
    assert torch.equal(scale[:, 0], powers)
    assert torch.equal(scale[:, 1], 2 * powers)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("fp8", QMAX)
def test_zero_group_has_the_floor_as_scale_and_zero_codes(fp8, dtype):
    """The amax is at least 1e-10: nothing divides by 0.  The code of -0 is NaN in fnuz."""
    q, scale = fp8_group_quant(torch.full((1, 128), -0.0, dtype=dtype), dtype=fp8)
    assert scale.item() == pytest.approx(1e-10 / QMAX[fp8], rel=1e-6)
    assert (q.float() == 0).all()


@pytest.mark.parametrize("fp8", QMAX)
@pytest.mark.parametrize("scale_format", ["fp32", "ue8m0"])
def test_nan_makes_its_group_nan_and_no_other(scale_format, fp8):
    """A maximum that drops the NaN would hide it in 127 plausible codes."""
    x = torch.ones(2, 384, dtype=torch.bfloat16)
    x[1, 200] = math.nan
    q, scale = fp8_group_quant(x, scale_format=scale_format, dtype=fp8)
    hit = torch.zeros(2, 3, dtype=torch.bool)
    hit[1, 1] = True
    assert torch.equal(scale.isnan(), hit)
    assert torch.equal(q.float().isnan(), hit.repeat_interleave(128, dim=1))


@pytest.mark.parametrize("fp8", QMAX)
@pytest.mark.parametrize("scale_format", ["fp32", "ue8m0"])
@pytest.mark.parametrize("infinity", [math.inf, -math.inf])
def test_infinity_makes_its_scale_infinite_and_its_own_code_nan(infinity, scale_format, fp8):
    """The finite elements of the group become 0; other groups do not notice."""
    x = torch.full((1, 256), -3.0)
    x[0, 77] = infinity
    q, scale = fp8_group_quant(x, scale_format=scale_format, dtype=fp8)
    assert scale[0, 0] == math.inf
    assert q[0, 77].float().isnan()
    assert (q[0, :128].float().nan_to_num(nan=0) == 0).all()
    assert (q[0, 128:].float() * scale[0, 1] == -3).all()


@pytest.mark.parametrize("special", [math.nan, math.inf])
def test_packed_exponent_of_a_group_that_is_not_finite_is_255(special):
    """255 means NaN in E8M0, and shifted back into a float32 it is the infinity."""
    x = torch.ones(1, 512)
    x[0, 129] = special
    _, packed = fp8_group_quant(x, scale_format="ue8m0_packed", scale_layout="column_tma", dtype=FN)
    assert (packed.item() >> 8) & 0xFF == 255
    assert packed.item() & 0xFF == 127 - 8  # 1 / 448 rounds up to 2**-8


def test_dtype_none_called_directly_means_the_device_s_own():
    """On a CPU that is float8_e4m3fn."""
    assert fp8_group_quant(torch.ones(1, 128))[0].dtype == FN


BAD = {
    "rank": ({"x": torch.ones(128)}, r"x.shape: found \(128,\), needed 2 dimensions"),
    "dtype": ({"x": torch.ones(2, 256).double()}, "x.dtype: found torch.float64, needed torch.bf"),
    "stride": ({"x": torch.ones(256, 2).t()}, r"x.stride\(-1\): found 2 .*, needed 1"),
    "k": ({"x": torch.ones(2, 200)}, r"x.shape\[1\]: found 200, needed a positive multiple of gro"),
    "empty": ({"x": torch.ones(2, 0)}, r"x.shape\[1\]: found 0, needed a positive multiple"),
    "group_size": ({"group_size": 0}, "group_size: found 0, needed a positive number"),
    "layout": ({"scale_layout": "col"}, "scale_layout: found 'col', needed 'row' or 'column' or"),
    "format": ({"scale_format": "e8m0"}, "scale_format: found 'e8m0', needed 'fp32' or 'ue8m0'"),
    "pair": ({"scale_format": "ue8m0_packed"}, "scale_layout: found 'row', needed 'column_tma'"),
    "fp8": ({"dtype": torch.float8_e5m2}, "dtype: found torch.float8_e5m2, needed torch.float8_e4"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_argument_is_refused_with_what_was_found_and_needed(change, message):
    """Nothing is cast, cut or copied to make a wrong call fit."""
    with pytest.raises(InputError, match=message):
        fp8_group_quant(**{"x": torch.ones(2, 256)} | change)

"""fp8_blockscale_gemm: against float64, with every scale looked up by its index."""

import pytest
import torch

from hwfuse import InputError, layouts
from hwfuse.ops.fp8_blockscale_gemm import make_inputs
from hwfuse_reference.torch_ops.fp8_blockscale_gemm import fp8_blockscale_gemm

FN, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz


def exact(a, a_scale, b, b_scale):
    """Return the product in float64, and the sum of its terms' sizes; b is plain."""
    k = a.shape[1]
    column_block = [i // 128 for i in range(b.shape[0])]
    k_block = [i // 128 for i in range(k)]
    scaled_a = a.double() * a_scale.double()[:, k_block]
    scaled_b = b.double() * b_scale.double()[column_block][:, k_block]
    return scaled_a @ scaled_b.t(), scaled_a.abs() @ scaled_b.abs().t()


def assert_close(out, product, terms, rounding=2**-8):
    """One rounding of the result (2**-25: float16's subnormals), and float32 noise of the sum."""
    error = (out.double() - product).abs()
    assert (error <= rounding * product.abs() * 1.01 + 2**-25 + 2e-6 * terms).all()


def calc_diff(x, y):
    """DeepGEMM's distance: 0 for equal, about 1 for unrelated matrices."""
    x, y = x.double(), y.double()
    return (1 - 2 * (x * y).sum() / (x * x + y * y).sum()).item()


@pytest.mark.parametrize("fp8", [FN, FNUZ])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 128, 128), (2, 576, 384), (16, 256, 512), (17, 100, 640), (3, 1, 128)]
)
def test_product_agrees_with_float64_for_any_n(m, n, k, fp8):
    """The last block of columns may be short: 576 is four and a half blocks."""
    inputs = make_inputs(m=m, n=n, k=k, fp8=fp8, row_pad=16)
    out = fp8_blockscale_gemm(**inputs)
    assert (out.dtype, out.shape, out.is_contiguous()) == (torch.bfloat16, (m, n), True)
    del inputs["out_dtype"]
    assert_close(out, *exact(**inputs))


def test_float16_result_is_rounded_once_from_float32():
    """bfloat16 in between would cost three bits."""
    inputs = make_inputs(m=4, n=256, k=256, dtype=torch.float16)
    inputs["a_scale"] *= 2**-8  # within float16's range
    out = fp8_blockscale_gemm(**inputs)
    assert out.dtype == torch.float16
    del inputs["out_dtype"]
    assert_close(out, *exact(**inputs), rounding=2**-11)


@pytest.mark.parametrize(
    "wrong", ["a_scale rows", "a_scale groups", "b_scale groups", "b_scale rows"]
)
def test_misplaced_scale_is_far_outside_the_bound(wrong):
    """make_inputs is adversarial: permuted scales cannot pass the comparator's 1e-3."""
    inputs = make_inputs(m=8, n=512, k=512)
    out = fp8_blockscale_gemm(**inputs)
    name, axis = wrong.split()
    inputs[name] = inputs[name].flip(0 if axis == "rows" else 1)
    assert calc_diff(out, fp8_blockscale_gemm(**inputs)) > 0.1


@pytest.mark.parametrize("m", [1, 3, 4, 5])
@pytest.mark.parametrize("scale_layout", ["column", "column_tma"])
def test_layout_of_a_scale_does_not_change_a_bit(scale_layout, m):
    """Strides are read, never assumed."""
    inputs = make_inputs(m=m, n=192, k=640)
    out = fp8_blockscale_gemm(**inputs)
    inputs["a_scale"] = layouts.convert(inputs["a_scale"], scale_layout)
    assert torch.equal(fp8_blockscale_gemm(**inputs), out)


@pytest.mark.parametrize("k", [128, 512, 640])
def test_packed_exponents_mean_the_powers_of_two_that_they_encode(k):
    """Group 4i + b is byte b of word i."""
    packed = make_inputs(m=5, n=128, k=k, scale_format="ue8m0_packed", scale_layout="column_tma")
    words = packed["a_scale"].tolist()
    scale = [
        [2.0 ** ((row[g // 4] >> 8 * (g % 4) & 0xFF) - 127) for g in range(k // 128)]
        for row in words
    ]
    plain = packed | {"a_scale": torch.tensor(scale)}
    assert len(plain["a_scale"].unique()) > 1
    assert torch.equal(fp8_blockscale_gemm(**packed), fp8_blockscale_gemm(**plain))


@pytest.mark.parametrize(("n", "k"), [(16, 128), (576, 256)])
def test_preshuffled_weight_gives_the_same_bits_as_the_plain_one(n, k):
    """The rank tells them apart; the scales stay those of the plain weight."""
    inputs = make_inputs(m=4, n=n, k=k)
    flat = torch.empty(n * k, dtype=FN)
    for row in range(n):
        for start in range(0, k, 16):
            at = row // 16 * 16 * k + start // 16 * 256 + row % 16 * 16
            flat[at : at + 16] = inputs["b"][row, start : start + 16]
    shuffled = flat.view(n // 16, k // 32, 2, 16, 16)
    assert torch.equal(
        fp8_blockscale_gemm(**inputs | {"b": shuffled}), fp8_blockscale_gemm(**inputs)
    )


def test_no_rows_give_an_empty_result():
    """M = 0 is legal."""
    assert fp8_blockscale_gemm(**make_inputs(m=0, n=256, k=256)).shape == (0, 256)


A = torch.zeros(3, 256).to(FN)
S = torch.ones(3, 2)
BAD = {
    "a dtype": ({"a": A.float()}, "a.dtype: found torch.float32, needed torch.float8_e4m3fn or"),
    "k": ({"a": A[:, :200]}, r"a.shape\[1\]: found 200, needed a positive multiple of 128"),
    "a stride": ({"a": A.view(256, 3).t()}, r"a.stride\(-1\): found 3 .*, needed 1"),
    "b flavour": ({"b": A.view(FNUZ)}, "b.dtype: found torch.float8_e4m3fnuz, needed .*fn, as a"),
    "b rank": ({"b": A[0]}, r"b.shape: found \(256,\), needed 2 dimensions"),
    "b k": ({"b": A[:, :128]}, r"b.shape: found \(3, 128\), needed \[n, k = 256\], as a"),
    "tiles": (
        {"b": A.view(3, 1, 1, 16, 16)},
        r"b.shape: .*needed \[n/16, 8, 2, 16, 16\] for k = 25",
    ),
    "tile order": (
        {"b": torch.zeros(1, 8, 2, 16, 16).to(FN).transpose(3, 4)},
        r"b.stride\(\): .* needed a contiguous preshuffled weight",
    ),
    "scale rank": ({"a_scale": S[0]}, r"a_scale.shape: found \(2,\), needed 2 dimensions"),
    "scale rows": (
        {"a_scale": S[:2]},
        r"a_scale.shape\[0\]: found 2, needed 3, the number of rows",
    ),
    "scale width": ({"a_scale": S[:, :1]}, r"a_scale.shape\[1\]: found 1, needed 2 = k/128"),
    "packed width": (
        {"a_scale": S.int()},
        r"a_scale.shape\[1\]: found 2, needed 1 = ceil\(k/512\)",
    ),
    "scale dtype": (
        {"a_scale": S.half()},
        "a_scale.dtype: found torch.float16, needed .*32 or .*32",
    ),
    "b_scale": ({"b_scale": S[:2]}, r"b_scale.shape: found \(2, 2\), needed .* = \(1, 2\)"),
    "b_scale dtype": ({"b_scale": S[:1].half()}, "b_scale.dtype: found torch.float16, needed .*32"),
    "out_dtype": (
        {"out_dtype": torch.float32},
        "out_dtype: found torch.float32, needed .*bfloat16",
    ),
    "device": ({"b": A.to("meta")}, "b.device: found meta, needed cpu, as a"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_argument_is_refused_with_what_was_found_and_needed(change, message):
    """Nothing is cast, cut or copied to make a wrong call fit."""
    good = {"a": A, "a_scale": S, "b": A, "b_scale": S[:1]}
    with pytest.raises(InputError, match=message):
        fp8_blockscale_gemm(**good | change)

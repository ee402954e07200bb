"""w4a8_grouped_gemm: against float64, with every weight and scale looked up by its index."""

import itertools
import math

import pytest
import torch

from hwfuse import InputError
from hwfuse.ops.w4a8_grouped_gemm import make_inputs
from hwfuse.testing.compare import rel_frobenius
from hwfuse_reference.torch_ops import w4a8_grouped_gemm as reference
from hwfuse_reference.torch_ops.w4a8_grouped_gemm import w4a8_grouped_gemm

FN = torch.float8_e4m3fn
SHAPES = [
    # experts, n, k, interleave
    (1, 128, 128, 1),
    (3, 192, 384, 1),
    (8, 100, 512, 4),
    (8, 100, 512, 1),
    (2, 1, 1024, 4),
]


def weight(b, b_scale):
    """Return the weight ``[E, N, K]`` in float64: nibbles and scales by the contract's indices."""
    n, width = b.shape[1:]
    k = torch.arange(2 * width)
    nibble = (b.int()[:, :, k // 2] & 0xFF) >> (4 * (k % 2)) & 0xF
    number = torch.where(nibble < 8, nibble, nibble - 16)
    i, g = b_scale.shape[2] // n, k // 128
    rows = torch.arange(n)[:, None]
    return number.double() * b_scale.double()[:, g // i, rows * i + g % i]


def exact(a, a_scale, b, b_scale, expert_offsets):
    """Return the rows of all experts in float64, and the sums of their terms' sizes."""
    w, offsets = weight(b, b_scale), expert_offsets.tolist()
    parts = [a[x:y].double() for x, y in itertools.pairwise(offsets)]
    factor = a_scale.double()
    rows = torch.cat([part @ w[e].t() for e, part in enumerate(parts)]) * factor
    return rows, torch.cat([part.abs() @ w[e].abs().t() for e, part in enumerate(parts)]) * factor


def used(inputs, **changes):
    """Return the rows in use of a call's result."""
    return w4a8_grouped_gemm(**inputs | changes)[: int(inputs["expert_offsets"][-1])]


@pytest.mark.parametrize("m", [0, 1, 3, 33, 130])
@pytest.mark.parametrize(("num_experts", "n", "k", "interleave"), SHAPES)
def test_rows_agree_with_float64(num_experts, n, k, interleave, m):
    """One rounding to bfloat16 and float32 noise.  Rows of no expert are NaN here."""
    inputs = make_inputs(m=m, n=n, k=k, num_experts=num_experts, interleave=interleave, row_pad=16)
    out = w4a8_grouped_gemm(**inputs)
    assert (out.dtype, out.shape, out.is_contiguous()) == (torch.bfloat16, (m, n), True)
    rows, terms = exact(**inputs)
    error = (used(inputs).double() - rows).abs()
    assert (error <= 2**-8 * rows.abs() * 1.01 + 2e-6 * terms).all()


def test_each_byte_holds_two_signed_numbers_low_nibble_first():
    """All 256 bytes, read out by rows of the identity."""
    b = torch.arange(-128, 128, dtype=torch.int8).view(1, 1, 256)
    expected = []
    for byte in range(-128, 128):
        low, high = byte & 0xF, byte >> 4 & 0xF
        expected += [low - 16 if low > 7 else low, high - 16 if high > 7 else high]
    scale = torch.ones(1, 4, 1, dtype=torch.bfloat16)
    offsets = torch.tensor([0, 512], dtype=torch.int32)
    out = w4a8_grouped_gemm(torch.eye(512).to(FN), torch.ones(1), b, scale, offsets)
    assert out.flatten().tolist() == expected


@pytest.mark.parametrize("interleave", [1, 4])
def test_each_group_of_each_row_has_its_own_scale(interleave):
    """Powers of two that name row and group; the weight is 1 throughout."""
    n, num_groups = 3, 8
    b_scale = torch.empty(1, num_groups // interleave, n * interleave, dtype=torch.bfloat16)
    for row in range(n):
        for g in range(num_groups):
            at = row * interleave + g % interleave
            b_scale[0, g // interleave, at] = 2.0 ** (row * num_groups + g)
    a = torch.zeros(num_groups, 128 * num_groups)
    for g in range(num_groups):
        a[g, 128 * g + 127] = 1.0
    b = torch.full((1, n, 64 * num_groups), 0x11, dtype=torch.int8)
    offsets = torch.tensor([0, num_groups], dtype=torch.int32)
    out = w4a8_grouped_gemm(a.to(FN), torch.ones(1), b, b_scale, offsets)
    expected = [[2.0 ** (row * num_groups + g) for row in range(n)] for g in range(num_groups)]
    assert out.tolist() == expected


@pytest.mark.parametrize(
    "wrong", ["nibbles", "interleave", "groups", "rows", "sign", "experts", "offsets"]
)
def test_misread_weight_is_far_outside_the_bound(wrong):
    """make_inputs is adversarial: none of these passes the comparator's 2e-3."""
    inputs = make_inputs(m=33, n=128, k=1024, num_experts=4)
    b, scale, offsets = inputs["b"], inputs["b_scale"], inputs["expert_offsets"]
    changes = {
        "nibbles": {"b": (b << 4) | (b >> 4 & 0xF)},
        "interleave": {"b_scale": scale.view(4, 8, 128)},
        "groups": {"b_scale": scale.flip(1)},
        "rows": {"b_scale": scale.roll(4, dims=2)},
        "sign": {"b_scale": scale.abs()},
        "experts": {"b": b.roll(1, dims=0)},
        "offsets": {"expert_offsets": torch.cat([offsets[:1], offsets[1:-1] + 1, offsets[-1:]])},
    }
    assert rel_frobenius(used(inputs, **changes[wrong]), used(inputs), bound=0.1)


def test_interleave_of_the_scales_does_not_change_a_bit():
    """The shape tells 4 from 1."""
    inputs = make_inputs(m=9, n=64, k=1024, num_experts=2, interleave=4)
    by_group = inputs["b_scale"].view(2, 2, 64, 4).transpose(2, 3).reshape(2, 8, 64)
    assert torch.equal(used(inputs, b_scale=by_group), used(inputs))


def test_negative_scales_turn_the_sign_of_the_result():
    """Scales of a checkpoint may have either sign."""
    inputs = make_inputs(m=9, n=64, k=256, num_experts=2)
    assert torch.equal(used(inputs, b_scale=-inputs["b_scale"]), -used(inputs))


@pytest.mark.parametrize("bounds", [(0, 0, 0, 0), (0, 7, 7, 7), (0, 0, 7, 7), (0, 0, 0, 6)])
def test_empty_experts_have_no_rows(bounds):
    """All of them, the first, the last or those in between."""
    inputs = make_inputs(m=7, n=64, k=256, num_experts=3)
    inputs["a"] = torch.randn(7, 256, generator=torch.Generator().manual_seed(0)).to(FN)
    inputs["expert_offsets"] = torch.tensor(bounds, dtype=torch.int32)
    assert w4a8_grouped_gemm(**inputs).shape == (7, 64)
    rows, terms = exact(**inputs)
    assert ((used(inputs).double() - rows).abs() <= 2**-8 * rows.abs() + 2e-6 * terms).all()


def test_rows_of_no_expert_change_no_other():
    """They are NaN or zero: the rows in use have the same bits."""
    inputs = make_inputs(m=33, n=64, k=256, num_experts=3)
    assert inputs["a"].float().isnan().any()
    clean = inputs["a"].float().nan_to_num(0.0).to(FN)
    assert torch.equal(used(inputs, a=clean), used(inputs))


def test_activation_scale_multiplies_the_sum_once_and_beyond_float16():
    """Real models reach numbers that float16 has as infinity."""
    inputs = make_inputs(m=8, n=64, k=256, num_experts=1, row_pad=8)
    inputs["a_scale"] = torch.ones(1)
    large = used(inputs, a_scale=torch.tensor([2.0**20]))
    assert torch.equal(large, used(inputs) * 2**20)
    assert large.abs().max() > torch.finfo(torch.float16).max
    assert large.isfinite().all()


@pytest.mark.parametrize("block", [1, 64 * 7, 1 << 20])
def test_size_of_the_blocks_changes_rounding_noise_at_most(monkeypatch, block):
    """The reference unpacks a weight by blocks of rows, of which the last may be short."""
    monkeypatch.setattr(reference, "_BLOCK", block)
    inputs = make_inputs(m=9, n=50, k=128, num_experts=2)
    rows, terms = exact(**inputs)
    error = (used(inputs).double() - rows).abs()
    assert (error <= 2**-8 * rows.abs() * 1.01 + 2e-6 * terms).all()


def test_nan_stays_in_its_row():
    """A NaN in use is not hidden."""
    inputs = make_inputs(m=2, n=64, k=128, num_experts=1)
    inputs["a"] = torch.ones(2, 128).index_fill(0, torch.tensor(1), math.nan).to(FN)
    assert used(inputs).isnan().all(dim=1).tolist() == [False, True]


@pytest.mark.parametrize(("num_experts", "n", "k"), [(3, 192, 384), (2, 64, 1024), (1, 128, 128)])
def test_repacked_weight_gives_the_bits_of_the_plain_one(num_experts, n, k):
    """Its rank says what it is; the scales come along inside."""
    sizes = {"m": 33, "n": n, "k": k, "num_experts": num_experts}
    plain, repacked = make_inputs(**sizes), make_inputs(**sizes, is_repacked=True)
    assert repacked["b"].shape == (num_experts, n // 64, k // 128, 4224)
    assert repacked["b_scale"].shape == (0,)
    assert torch.equal(used(repacked), used(plain))


A, B = torch.zeros(3, 512).to(FN), torch.zeros(2, 8, 256, dtype=torch.int8)
S = torch.ones(2, 4, 8, dtype=torch.bfloat16)
OFFSETS = torch.zeros(3, dtype=torch.int32)
BLOCKS, NO_SCALE = torch.zeros(2, 1, 4, 4224, dtype=torch.int8), S[:0, 0, 0]
BAD = {
    "a": ({"a": A.float()}, "a.dtype: found torch.float32, needed torch.float8_e4m3fn"),
    "fnuz": ({"a": A.view(torch.float8_e4m3fnuz)}, "a.dtype: found torch.float8_e4m3fnuz, need"),
    "k": ({"a": A[:, :192]}, r"a.shape\[1\]: found 192, needed a positive multiple of 128"),
    "stride": ({"a": A.view(512, 3).t()}, r"a.stride\(-1\): found 3 .*, needed 1"),
    "a_scale": ({"a_scale": torch.ones(3)}, r"a_scale.shape: found \(3,\), needed \(1,\)"),
    "b dtype": ({"b": B.byte()}, "b.dtype: found torch.uint8, needed torch.int8"),
    "b": ({"b": B[..., :128]}, r"b.shape: found \(2, 8, 128\), needed .* 256\]: two of 512"),
    "b stride": ({"b": B.view(2, 256, 8).mT}, r"b.stride\(-1\): found 8 .*, needed 1"),
    "scale dtype": ({"b_scale": S.float()}, "b_scale.dtype: found torch.float32, needed .*16"),
    "scale": (
        {"b_scale": S.view(2, 2, 16)},
        r"b_scale.shape: found \(2, 2, 16\), needed \(2, 1, 32\), interleaved by 4, or \(2, 4, 8\)",
    ),
    "scale of odd k": (
        {"a": A[:, :384], "b": B[..., :192]},
        r"b_scale.shape: found \(2, 4, 8\), needed \(2, 3, 8\)",
    ),
    "offsets": ({"expert_offsets": OFFSETS[:2]}, r"expert_offsets.shape\[0\]: found 2, needed 3"),
    "offsets dtype": ({"expert_offsets": OFFSETS.long()}, "expert_offsets.dtype: found .*int64"),
    "device": ({"b": B.to("meta")}, "b.device: found meta, needed cpu, as a"),
    "blocks": (
        {"b": BLOCKS[:, :, :3], "b_scale": NO_SCALE},
        r"b.shape: found \(2, 1, 3, 4224\), needed \[experts, rows / 64, 4, 4224\], repacked",
    ),
    "rank of the scale": ({"b": BLOCKS}, r"b_scale.shape: found \(2, 4, 8\), needed 1 dimensions"),
    "scale of blocks": (
        {"b": BLOCKS, "b_scale": S[0, 0]},
        r"b_scale.shape: found \(8,\), needed \(0,\): a repacked b holds the scales",
    ),
    "no scale": ({"b_scale": NO_SCALE}, r"b_scale.shape: found \(0,\), needed 3 dimensions"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_argument_is_refused_with_what_was_found_and_needed(change, message):
    """Nothing is cast, cut or copied to make a wrong call fit."""
    good = {"a": A, "a_scale": torch.ones(1), "b": B, "b_scale": S, "expert_offsets": OFFSETS}
    with pytest.raises(InputError, match=message):
        w4a8_grouped_gemm(**good | change)

"""fused_qkvzba: a permutation of columns, bit for bit."""

import pytest
import torch

from hwfuse import InputError
from hwfuse.ops.fused_qkvzba import make_inputs
from hwfuse_reference.torch_ops.fused_qkvzba import fused_qkvzba

LAYOUTS = ("interleaved", "contiguous")
HEADS = ((16, 16), (16, 32), (16, 48), (16, 64), (8, 24), (4, 16), (2, 16), (1, 3), (1, 1))
INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def columns(hk, hv, dk, dv, layout):
    """Return, for each result, the columns of qkvz (mixed_qkv, z) or ba (b, a) in its order."""
    r = hv // hk
    if layout == "interleaved":
        s = 2 * dk + 2 * r * dv
        q = [g * s + d for g in range(hk) for d in range(dk)]
        k = [g * s + dk + d for g in range(hk) for d in range(dk)]
        v = [h // r * s + 2 * dk + h % r * dv + d for h in range(hv) for d in range(dv)]
        z = [h // r * s + 2 * dk + r * dv + h % r * dv + d for h in range(hv) for d in range(dv)]
        b = [h // r * 2 * r + h % r for h in range(hv)]
        a = [h // r * 2 * r + r + h % r for h in range(hv)]
    else:
        q = [g * dk + d for g in range(hk) for d in range(dk)]
        k = [hk * dk + g * dk + d for g in range(hk) for d in range(dk)]
        v = [2 * hk * dk + h * dv + d for h in range(hv) for d in range(dv)]
        z = [2 * hk * dk + hv * dv + h * dv + d for h in range(hv) for d in range(dv)]
        b, a = list(range(hv)), [hv + h for h in range(hv)]
    return q + k + v, z, b, a


def any_bits(m, width, dtype, row_pad=0):
    """Return every kind of bit pattern: NaN payloads, infinities, both zeros, subnormals."""
    integer = INTEGERS[dtype]
    info = torch.iinfo(integer)
    drawn = torch.randint(info.min, info.max + 1, (m, width + row_pad), dtype=integer)
    return drawn.view(dtype)[:, row_pad // 2 : row_pad // 2 + width]


def bits(x):
    """Return the elements as integers, which compare NaN and the sign of zero."""
    return x.view(INTEGERS[x.dtype])


def assert_split(qkvz, ba, hk, hv, dk, dv, layout):
    """Assert that every result is its columns of its source, bit for bit."""
    results = fused_qkvzba(qkvz, ba, head_k_dim=dk, head_v_dim=dv, layout=layout)
    sources = (qkvz, qkvz, ba, ba)
    for result, source, order in zip(
        results, sources, columns(hk, hv, dk, dv, layout), strict=True
    ):
        expected = bits(source)[:, order]
        assert torch.equal(bits(result).reshape(expected.shape), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("hk", "hv"), HEADS)
def test_split_of_any_bits_follows_the_index_formulas(hk, hv, layout):
    """Each result is the columns that the layout's index formulas name, for every r, 3 included."""
    torch.manual_seed(0)
    for m, dk, dv in ((1, 64, 64), (37, 8, 8), (4, 16, 4), (0, 8, 8)):
        qkvz = any_bits(m, 2 * hk * dk + 2 * hv * dv, torch.bfloat16)
        assert_split(qkvz, any_bits(m, 2 * hv, torch.bfloat16), hk, hv, dk, dv, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("ba_dtype", INTEGERS)
def test_split_of_row_slices_reads_each_tensor_by_its_own_stride(layout, dtype, ba_dtype):
    """Rows may be slices of wider buffers, and the two dtypes are independent."""
    torch.manual_seed(1)
    qkvz = any_bits(5, 2 * 2 * 8 + 2 * 6 * 8, dtype, row_pad=64)
    ba = any_bits(5, 2 * 6, ba_dtype, row_pad=7)
    assert_split(qkvz, ba, 2, 6, 8, 8, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_row_offset_past_2_to_the_31_reads_the_right_row(layout, tmp_path):
    """Offsets are 64 bit; the storage is a sparse file of which only three rows exist."""
    stride = 2**30 + 3
    storage = torch.from_file(
        str(tmp_path / "sparse"), shared=True, size=2 * stride + 64, dtype=torch.bfloat16
    )
    qkvz = storage.as_strided((3, 64), (stride, 1))
    qkvz.copy_(torch.arange(3 * 64).view(3, 64))
    assert_split(qkvz, any_bits(3, 12, torch.bfloat16), 1, 6, 2, 5, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("hk", "hv"), [(1, 1), (1, 4), (4, 4)])
def test_results_share_no_storage_and_are_contiguous(hk, hv, layout):
    """The r = 1 and one-head reshapes would be views: strided a and b broke a model's accuracy."""
    inputs = make_inputs(m=3, num_k_heads=hk, num_v_heads=hv, layout=layout)
    results = fused_qkvzba(**inputs)
    tensors = (inputs["qkvz"], inputs["ba"], *results)
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)
    assert all(t.is_contiguous() for t in results)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("m", [0, 3])
def test_gradient_goes_to_the_one_source_of_each_element(m, layout):
    """The backward of a permutation is its inverse."""
    inputs = make_inputs(m=m, num_k_heads=2, num_v_heads=6, layout=layout, dtype=torch.float32)
    qkvz, ba = inputs["qkvz"].requires_grad_(), inputs["ba"].requires_grad_()
    results = fused_qkvzba(**inputs)
    cotangents = [torch.randn_like(t) for t in results]
    of_qkvz, of_ba = torch.autograd.grad(results, (qkvz, ba), cotangents)
    orders = columns(2, 6, 128, 128, layout)
    for gradient, order, expected in zip(
        (of_qkvz, of_qkvz, of_ba, of_ba), orders, cotangents, strict=True
    ):
        assert torch.equal(gradient[:, order], expected.flatten(1))


def good():
    """Return the arguments of a valid call: two key heads, four value heads, width 96."""
    return make_inputs(m=3, num_k_heads=2, num_v_heads=4, head_k_dim=8, head_v_dim=8)


WIDE = torch.zeros(3, 96, dtype=torch.bfloat16)
BAD = {
    "rank": ({"qkvz": WIDE[0]}, r"qkvz.shape: found \(96,\), needed 2 dimensions"),
    "dtype": ({"ba": WIDE[:, :8].int()}, r"ba.dtype: found torch.int32, needed torch.bfloat16 or"),
    "last stride": ({"ba": WIDE[:, ::12]}, r"ba.stride\(-1\): found 12 .*, needed 1"),
    "rows": ({"ba": WIDE[:2, :8]}, r"ba.shape\[0\]: found 2, needed 3, the number of rows of qkvz"),
    "device": ({"ba": WIDE[:, :8].to("meta")}, "ba.device: found meta, needed cpu, as qkvz"),
    "odd ba": ({"ba": WIDE[:, :7]}, r"ba.shape\[1\]: found 7, needed 2 \* num_v_heads, even"),
    "no heads": ({"ba": WIDE[:, :0]}, r"ba.shape\[1\]: found 0, needed 2 \* num_v_heads, .*posi"),
    "width": (
        {"qkvz": WIDE[:, :95]},
        r"qkvz.shape\[1\]: found 95, needed 2 \* num_k_heads \* 8 \+",
    ),
    "no key heads": ({"qkvz": WIDE[:, :64]}, r"qkvz.shape\[1\]: found 64, needed 2 \* num_k_heads"),
    "ratio": ({"ba": WIDE[:, :4]}, "num_v_heads: found 2, needed a multiple of num_k_heads = 4"),
    "head_k_dim": ({"head_k_dim": 0}, "head_k_dim: found 0, needed a positive number"),
    "head_v_dim": ({"head_v_dim": -8}, "head_v_dim: found -8, needed a positive number"),
    "layout": ({"layout": "split"}, "layout: found 'split', needed 'interleaved' or 'contiguous'"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_argument_is_refused_with_what_was_found_and_needed(change, message):
    """Nothing is cast, cut or copied to make a wrong call fit."""
    with pytest.raises(InputError, match=message):
        fused_qkvzba(**good() | change)

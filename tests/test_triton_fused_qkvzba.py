"""The Triton kernel of fused_qkvzba, in the corrected interpreter, bit for bit."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("numpy", reason="Triton's interpreter computes with numpy")

from hwfuse import InputError
from hwfuse.ops import fused_qkvzba as spec
from hwfuse.testing._interpreter import interpreted
from hwfuse_triton import fused_qkvzba as shared

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def run(**arguments):
    """Call the kernel in the interpreter."""
    with interpreted():
        return shared.fused_qkvzba(**arguments)


def expected(qkvz, ba, *, head_k_dim, head_v_dim, layout):
    """Pick every output element by the index formulas of the two layouts."""
    m, hk, hv, r = spec.sizes(qkvz, ba, head_k_dim=head_k_dim, head_v_dim=head_v_dim, layout=layout)
    dk, dv = head_k_dim, head_v_dim
    g, d = torch.arange(hk)[:, None], torch.arange(dk)
    h, e = torch.arange(hv)[:, None], torch.arange(dv)
    if layout == "interleaved":
        record = 2 * dk + 2 * r * dv
        q, k = g * record + d, g * record + dk + d
        v = (h // r) * record + 2 * dk + (h % r) * dv + e
        z = v + r * dv
        b = (h // r) * 2 * r + h % r
        a = b + r
    else:
        q, k = g * dk + d, hk * dk + g * dk + d
        v = 2 * hk * dk + h * dv + e
        z = v + hv * dv
        b, a = h, hv + h
    mixed = torch.cat([index.flatten() for index in (q, k, v)])
    return (
        qkvz[:, mixed],
        qkvz[:, z.flatten()].view(m, hv, dv),
        ba[:, b.flatten()],
        ba[:, a.flatten()],
    )


def assert_same_bits(found, wanted):
    """Compare bit patterns, so that NaN payloads and -0.0 count."""
    for x, y in zip(found, wanted, strict=True):
        bits = BITS[x.element_size()]
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert x.is_contiguous()
        assert torch.equal(x.view(bits), y.contiguous().view(bits))


def any_bits(m, width, dtype):
    """Random bit patterns: NaN of all payloads, infinities and -0.0 among them."""
    generator = torch.Generator().manual_seed(m + width)
    size = dtype.itemsize
    return torch.randint(0, 256, (m, width * size), generator=generator, dtype=torch.uint8).view(
        dtype
    )


@pytest.mark.parametrize("layout", spec.LAYOUTS)
@pytest.mark.parametrize("m", [1, 2, 37])
@pytest.mark.parametrize("r", [1, 2, 3, 4, 8])
def test_split_for_every_ratio_copies_every_bit(r, m, layout):
    """Any number of value heads per key head, tiles that span rows, all bit patterns."""
    hk, dims = (
        (2, {"head_k_dim": 64, "head_v_dim": 128})
        if r < 8
        else (1, {"head_k_dim": 128, "head_v_dim": 64})
    )
    width = 2 * hk * dims["head_k_dim"] + 2 * hk * r * dims["head_v_dim"]
    arguments = {
        "qkvz": any_bits(m, width, torch.bfloat16),
        "ba": any_bits(m, 2 * hk * r, torch.bfloat16),
        "layout": layout,
        **dims,
    }
    assert_same_bits(run(**arguments), expected(**arguments))


@pytest.mark.parametrize("layout", spec.LAYOUTS)
@pytest.mark.parametrize(("dk", "dv"), [(24, 20), (96, 128), (1, 3), (128, 4096)])
def test_split_for_odd_head_widths_masks_the_rest(dk, dv, layout):
    """Widths that are no power of two, tiny ones, and one wider than a whole tile."""
    arguments = spec.make_inputs(
        m=3, num_k_heads=3, num_v_heads=6, head_k_dim=dk, head_v_dim=dv, layout=layout
    )
    assert_same_bits(run(**arguments), expected(**arguments))


@pytest.mark.parametrize("layout", spec.LAYOUTS)
def test_split_of_full_size_heads_when_rows_exceed_a_tile_is_right(layout):
    """Qwen3-Next's own sizes: several tiles per row and section."""
    arguments = spec.make_inputs(m=2, num_k_heads=32, num_v_heads=64, layout=layout)
    assert_same_bits(run(**arguments), expected(**arguments))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("ba_dtype", [torch.bfloat16, torch.float32])
def test_split_for_mixed_dtypes_keeps_each(dtype, ba_dtype):
    """Logits have ba's dtype, the rest qkvz's."""
    qkvz, ba = any_bits(5, 2 * 2 * 64 + 2 * 4 * 64, dtype), any_bits(5, 8, ba_dtype)
    dims = {"head_k_dim": 64, "head_v_dim": 64, "layout": "interleaved"}
    assert_same_bits(run(qkvz=qkvz, ba=ba, **dims), expected(qkvz, ba, **dims))


@pytest.mark.parametrize("layout", spec.LAYOUTS)
@pytest.mark.parametrize("row_pad", [1, 2, 8])
def test_split_of_strided_rows_reads_each_row_where_it_is(row_pad, layout):
    """Row strides with and without a factor of 16 bytes."""
    arguments = spec.make_inputs(
        m=9,
        num_k_heads=2,
        num_v_heads=4,
        head_k_dim=64,
        head_v_dim=64,
        layout=layout,
        row_pad=row_pad,
    )
    assert arguments["qkvz"].stride(0) == arguments["qkvz"].shape[1] + row_pad
    assert_same_bits(run(**arguments), expected(**arguments))


def test_split_of_slices_of_one_merged_projection_is_right():
    """Qkvz and ba may be columns of one tensor, ba at an address that is a multiple of 2 only."""
    merged = any_bits(6, 768 + 1 + 8, torch.bfloat16)
    qkvz, ba = merged[:, :768], merged[:, 769:]
    dims = {"head_k_dim": 64, "head_v_dim": 64, "layout": "interleaved"}
    assert ba.data_ptr() % 4 == 2
    assert_same_bits(run(qkvz=qkvz, ba=ba, **dims), expected(qkvz, ba, **dims))


def test_split_of_a_row_beyond_two_to_the_31_elements_reads_that_row():
    """Offsets are computed in 64 bits.  The storage is reserved, its pages are never touched."""
    stride = 2**30 + 8
    storage = torch.empty(2 * stride + 1024, dtype=torch.float16)
    qkvz = storage.as_strided((3, 768), (stride, 1))
    qkvz.copy_(any_bits(3, 768, torch.float16))
    ba = storage[800:].as_strided((3, 8), (stride, 1))
    ba.copy_(any_bits(3, 8, torch.float16))
    dims = {"head_k_dim": 64, "head_v_dim": 64, "layout": "interleaved"}
    assert_same_bits(run(qkvz=qkvz, ba=ba, **dims), expected(qkvz, ba, **dims))


@pytest.mark.parametrize("layout", spec.LAYOUTS)
def test_split_without_rows_launches_nothing(layout):
    """M = 0: an accelerator refuses an empty grid, so it must never be asked."""
    arguments = spec.make_inputs(m=0, layout=layout)
    found = shared.fused_qkvzba(**arguments)  # would raise here: no driver, no interpreter
    assert [tuple(x.shape) for x in found] == [(0, 8192), (0, 32, 128), (0, 32), (0, 32)]


def test_split_of_more_heads_than_can_be_numbered_is_refused(monkeypatch):
    """Heads are numbered in 32 bits over all rows; beyond that there is an error, no wrong copy."""
    monkeypatch.setattr(shared, "_MAX_HEADS", 100)
    arguments = spec.make_inputs(m=4, num_k_heads=16, num_v_heads=32)
    with pytest.raises(InputError, match=r"qkvz.shape\[0\]: found 4, needed at most 3 rows"):
        run(**arguments)


@pytest.mark.parametrize("module", ["hwfuse_cuda", "hwfuse_rocm"])
def test_both_backends_call_the_shared_kernel(module):
    """One kernel file serves both vendors."""
    from importlib import import_module

    implementation = import_module(f"{module}.triton_ops.fused_qkvzba")
    arguments = spec.make_inputs(m=2, num_k_heads=1, num_v_heads=2, head_k_dim=16, head_v_dim=16)
    with interpreted():
        found = implementation.fused_qkvzba(**arguments)
    assert_same_bits(found, expected(**arguments))

"""The adapters to AMD's aiter and CK, on a stand-in that reads memory as AMD does."""

from __future__ import annotations

import importlib

import pytest
import torch

import hwfuse
from hwfuse import _group_quant, _spec, _state, layouts, packing
from hwfuse.ops import fp8_blockscale_gemm as gemm_spec
from hwfuse.testing import evidence, parity, pretend, row
from hwfuse.testing.compare import compare
from hwfuse_rocm import _aiter

M = (0, 1, 37)
GROUPS = ({"k": 384, "group_size": 128}, {"k": 192, "group_size": 64})
SCALES = ("row", "column", "column_tma")
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
SAFE_ROWS = tuple(  # broken only by large weights: a test of their own
    fact.source
    for fact in _state.registry().implementations("fp8_blockscale_gemm")["rocm/ck"].requires.facts
    if "m > " in fact.source
)
MATRIX = {
    "fp8_group_quant": row(m=M, groups=GROUPS, scale_layout=SCALES, dtype=FLOATS),
    "rms_norm_fp8_group_quant": row(m=M, groups=GROUPS, scale_layout=SCALES, dtype=FLOATS),
    "add_rms_norm_fp8_group_quant": row(m=M, groups=GROUPS, scale_layout=SCALES, dtype=FLOATS),
    "flatten_fp8_group_quant": row(
        m=M,
        h=(
            {"num_heads": 3, "head_dim": 256, "is_heads_first": False},
            {"num_heads": 2, "head_dim": 128, "is_heads_first": True},
            {"num_heads": 2, "head_dim": 384, "is_heads_first": False},
        ),
        scale_layout=SCALES,
        dtype=FLOATS,
    ),
    "fp8_blockscale_gemm": row(
        implied=SAFE_ROWS,
        m=M,
        b=(
            {"n": 272, "k": 384, "is_preshuffled": False},
            {"n": 272, "k": 384, "is_preshuffled": True},
            {"n": 37, "k": 128, "is_preshuffled": False},
        ),
        scale_layout=SCALES,
        dtype=FLOATS[:2],
    ),
    "fused_qkvbfg": row(m=M, hidden_size=96, num_heads=(1, 3), head_dim=64, dtype=FLOATS),
    "fused_qkvzba": row(
        m=M,
        h=(
            {"num_k_heads": 2, "num_v_heads": 4, "head_k_dim": 16, "head_v_dim": 32},
            {"num_k_heads": 3, "num_v_heads": 3, "head_k_dim": 64, "head_v_dim": 32},
        ),
        dtype=FLOATS,
    ),
}
ADAPTERS = [
    (op, identifier)
    for op in _spec.names()
    for identifier in _state.registry().implementations(op)
    if identifier in ("rocm/aiter", "rocm/ck")
]
DROPS_NAN = [op for op, _ in ADAPTERS if op.endswith("fp8_group_quant")]
BOTH = pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
VERSIONS = pytest.mark.parametrize("version", ["0.1.7", "head"])


@pytest.fixture
def finite(monkeypatch):
    """Inputs of the group quantisations without NaN, infinities and groups of zeros."""

    def rows(random, m, k, *, group_size, row_pad, dtype):
        exponents = random.integers(-6, 7, m, k // group_size, dtype=torch.float32)
        x = random.rows(m, k, row_pad=row_pad, dtype=dtype)
        return x.mul_(exponents.exp2().repeat_interleave(group_size, dim=1).to(dtype))

    monkeypatch.setattr(_group_quant, "make_rows", rows)
    # AMD's HIP kernel multiplies by 1/QMAX, which on the many ties of bfloat16 moves more codes by
    # one than a division in another order does: 0.3 % here.
    compare = hwfuse.op("fp8_group_quant").spec.compare
    monkeypatch.setitem(compare, "q", ("fp8_codes", {"max_codes": 1, "share": 5e-3}))


def outcome(op, identifier, arch, matrix=MATRIX):
    """Run the parity harness on one adapter: number passed, failures, reasons of skips."""
    passed, failed, skipped = 0, {}, set()
    for check in parity.checks([op], ["rocm"], f"rocm:{arch}", matrix):
        if check.implementation == identifier:
            try:
                check.prove()
                passed += 1
            except parity.NotTaken as reason:
                skipped.add(str(reason))
            except AssertionError as error:
                failed[check.name] = str(error)
    return passed, failed, skipped


@VERSIONS
@BOTH
@pytest.mark.parametrize(("op", "identifier"), ADAPTERS)
def test_adapter_on_the_stand_in_keeps_the_contract(
    op, identifier, arch, version, installed, finite
):
    """Values, formats, memory, refusals, M = 0; every call binds to AMD's signature."""
    calls = installed(version, arch)
    passed, failed, skipped = outcome(op, identifier, arch)
    if version == "0.1.7" and op == "fused_qkvzba":
        assert any("is not installed" in reason for reason in skipped)
        return
    is_proved = not failed and passed >= 8
    by = f"stand-in {version}"
    evidence.record(op, identifier, arch, "contract", passed=is_proved, by=by)
    assert is_proved, "\n".join(failed.values()) or skipped
    assert not any("not installed" in reason for reason in skipped)
    assert calls
    for label, args, _ in calls:
        required = [p for p in _aiter.FUNCTIONS[label].parameters.split(", ") if "=" not in p]
        assert len(args) <= len(required), f"{label}: an option is passed by its position"


@BOTH
@pytest.mark.parametrize("op", sorted(set(DROPS_NAN)))
def test_adapter_that_drops_nan_is_experimental_and_fails_on_nan(op, arch, installed):
    """Why these run only when named: with the op's own inputs the harness finds them wrong."""
    installed("head", arch)
    assert _state.registry().implementations(op)["rocm/aiter"].requires.experimental
    passed, failed, _ = outcome(op, "rocm/aiter", arch, {op: row(m=3)})  # the third row has a NaN
    assert passed
    assert any("nan" in text for text in failed.values())


@BOTH
@pytest.mark.parametrize("scale_layout", SCALES)
def test_both_ways_to_a_column_scale_give_the_same_bits(scale_layout, arch, installed):
    """A consumer of an honest scale in any layout computes the same numbers."""
    installed("head", arch)
    results = []
    for layout in ("column", scale_layout):
        inputs = gemm_spec.make_inputs(
            m=5, n=64, k=384, is_preshuffled=True, scale_layout=layout, fp8=_fp8(arch)
        )
        with pretend(f"rocm:{arch}"), hwfuse.using("rocm/aiter"):
            results.append(hwfuse.op("fp8_blockscale_gemm")(**inputs))
    assert torch.equal(*results)


def _fp8(arch):
    return hwfuse.fp8_dtype(f"rocm:{arch}")


# Negative controls: each mistake must be found.


def broken_gemm(monkeypatch, installed, arch="gfx942"):
    """Run the harness on the preshuffled GEMM; return the failures."""
    installed("head", arch)
    matrix = {"fp8_blockscale_gemm": row(m=(1, 37), n=272, k=384, is_preshuffled=True)}
    return outcome("fp8_blockscale_gemm", "rocm/aiter", arch, matrix)[1]


def test_row_major_scale_given_to_the_preshuffled_gemm_is_found(monkeypatch, installed):
    """AMD reads bytes: a row-major scale is silently another scale."""
    monkeypatch.setattr(layouts, "to_aiter_legacy", lambda s: layouts.convert(s, "row"))
    failed = broken_gemm(monkeypatch, installed)
    assert any("m=37" in name and "calc_diff" in text for name, text in failed.items())


def test_unshuffled_weight_given_to_the_preshuffled_gemm_is_found(monkeypatch, installed):
    """The bytes of a plain weight, presented as a shuffled one."""
    module = importlib.import_module("hwfuse_rocm.aiter_ops.fp8_blockscale_gemm")
    right = module._aiter.function

    def function(label):
        gemm = right(label)
        return lambda a, b, *rest, **more: gemm(
            a, packing.unpreshuffle_16x16(b.view(17, 12, 2, 16, 16)), *rest, **more
        )

    monkeypatch.setattr(module, "_aiter", _with(module._aiter, function=function))
    failed = broken_gemm(monkeypatch, installed)
    assert any("m=1-" in name and "calc_diff" in text for name, text in failed.items())


def _with(module, **changes):
    from types import SimpleNamespace

    return SimpleNamespace(**{**vars(module), **changes})


@BOTH
def test_wrong_flavour_of_fp8_is_refused_and_would_be_wrong(arch, installed):
    """The bytes of the other flavour are other numbers: a fact refuses them, compare would too."""
    installed("head", arch)
    other = _fp8("gfx950" if arch == "gfx942" else "gfx942")
    inputs = gemm_spec.make_inputs(m=5, n=64, k=384, fp8=other)
    with pretend(f"rocm:{arch}"):
        for identifier in ("rocm/aiter", "rocm/ck"):
            decision = hwfuse.explain("fp8_blockscale_gemm", **inputs)
            (reason,) = decision.rejected[identifier]
            assert "float8_e4m3fnuz" in reason
        right = hwfuse.op("fp8_blockscale_gemm").using("reference/torch")(**inputs)
        for name in ("a", "b"):
            inputs[name] = inputs[name].view(_fp8(arch))
        wrong = hwfuse.op("fp8_blockscale_gemm").using("rocm/aiter")(**inputs)
    assert compare(gemm_spec.COMPARE["out"], wrong, right, {})


@pytest.mark.parametrize("op", ["fp8_group_quant", "rms_norm_fp8_group_quant"])
def test_forward_trick_as_its_own_inverse_is_found(op, monkeypatch, installed, finite):
    """Transpose, copy, view is undone by view(G, M).t(), not by doing it again."""

    def forward_again(scale):
        trick = scale.t().contiguous().view(scale.shape)
        return layouts.convert(trick, "column")

    monkeypatch.setattr(layouts, "from_aiter_legacy", forward_again)
    installed("head", "gfx942")
    _, failed, _ = outcome(op, "rocm/aiter", "gfx942")
    assert any("column" in name and "m=37" in name for name in failed)
    assert not any("m=1-" in name or "-row" in name for name in failed)


def test_forgotten_quant_dtype_is_found(monkeypatch, installed, finite):
    """AMD's default is int8."""
    module = importlib.import_module("hwfuse_rocm.aiter_ops.fp8_group_quant")

    def function(label):
        quant = _aiter.function(label)
        return lambda x, **more: quant(x, group_size=more["group_size"])

    monkeypatch.setattr(module, "_aiter", _with(module._aiter, function=function))
    installed("0.1.7", "gfx950")
    _, failed, _ = outcome("fp8_group_quant", "rocm/aiter", "gfx950")
    assert any("dtype is torch.int8" in text for text in failed.values())


def test_unknown_keyword_is_refused_by_the_stand_in(installed):
    """The contract table binds every call: 0.1.7 does not know what head added."""
    installed("0.1.7", "gfx942")
    quant = _aiter.function("fused_flatten_fp8_group_quant")
    with pytest.raises(TypeError, match="transpose_scale"):
        quant(torch.ones(2, 2, 128), 128, transpose_scale=True)

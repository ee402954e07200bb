"""What AMD's devices get: by op, by policy, by a model that knows nothing of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import hwfuse
from hwfuse import _spec, _state, packing
from hwfuse.nn import FP8BlockLinear
from hwfuse.testing import pretend

ROOT = Path(__file__).parents[2]
ARCHES = ["gfx942", "gfx950"]
BOTH = pytest.mark.parametrize("arch", ARCHES)
GEMM = "fp8_blockscale_gemm"
SAFE = [(4608, 4096, 512), (2560, 4096, 2048), (4096, 2048, 2048), (4096, 1024, 4096)]


@pytest.fixture
def configured():
    """Put one file in force."""
    yield hwfuse.configure
    hwfuse.configure(None)


@BOTH
@pytest.mark.parametrize("op", _spec.names())
def test_op_explained_for_an_absent_device_gets_amd_code_where_there_is_some(op, arch):
    """`hwfuse explain OP --device rocm:gfx942` on any machine; no NVIDIA id is ever able."""
    decision = hwfuse.explain(op, device=f"rocm:{arch}")
    mine = [i for i in _state.registry().implementations(op) if i.startswith("rocm/")]
    competing = [
        i for i in mine if not _state.registry().implementations(op)[i].requires.experimental
    ]
    assert decision.pretended
    assert decision.chosen.startswith("rocm/" if competing else "reference/")
    assert not any(i.startswith("cuda/") for i in (decision.chosen, *decision.passed_over))


@BOTH
@pytest.mark.parametrize("is_preshuffled", [False, True])
def test_rank_of_the_weight_decides_what_runs(is_preshuffled, arch):
    """A preshuffled weight goes only to who reads it, and explain says that aiter decides."""
    decision = hwfuse.explain(GEMM, device=f"rocm:{arch}", is_preshuffled=is_preshuffled)
    assert decision.chosen == "rocm/aiter"
    assert ("aiter decides" in str(decision)) == is_preshuffled
    assert ("rocm/ck" in decision.rejected) == is_preshuffled


@BOTH
@pytest.mark.parametrize(("n", "k", "m"), SAFE)
def test_ck_is_refused_above_its_safe_number_of_rows(n, k, m, arch):
    """There CK gives NaN on ROCm before 7.2; no other weight is affected."""
    sizes = {"device": f"rocm:{arch}", "k": k}
    assert "rocm/ck" in hwfuse.explain(GEMM, m=m, n=n, **sizes).passed_over
    decision = hwfuse.explain(GEMM, m=m + 1, n=n, **sizes)
    assert f"(b.shape[0], k, m > {m}) = ({n}, {k}, True)" in decision.rejected["rocm/ck"][0]
    assert "rocm/ck" in hwfuse.explain(GEMM, m=m + 1, n=n + 128, **sizes).passed_over


@BOTH
def test_rocm_before_7_2_leaves_preshuffled_weights_to_the_reference(arch, installed):
    """Its compiler miscompiles them; plain ones go to CK."""
    installed("head", arch, rocm="7.1.25424")
    spec = hwfuse.op(GEMM).spec
    chosen = []
    with pretend(f"rocm:{arch}"):
        for is_preshuffled in (True, False):
            inputs = spec.make_inputs(m=2, n=64, k=256, is_preshuffled=is_preshuffled)
            decision = hwfuse.explain(GEMM, **inputs)
            assert decision.rejected["rocm/aiter"] == ("needs rocm>=7.2; found rocm 7.1.25424",)
            chosen.append(decision.chosen)
    assert chosen == ["reference/torch", "rocm/ck"]


@pytest.mark.parametrize(("arch", "name"), [("gfx942", "mi300x"), ("gfx950", "mi355x")])
def test_file_of_a_device_orders_its_gemms(arch, name, configured):
    """conf/mi300x.yaml and mi355x.yaml: the rules that SGLang has, as files."""
    configured(ROOT / "conf" / f"{name}.yaml")
    device = f"rocm:{arch}"
    first = hwfuse.explain(GEMM, device=device, m=64, n=7168, k=2048).chosen
    other = hwfuse.explain(GEMM, device=device, m=64, n=6144, k=5120).chosen
    assert (first, other) == ("rocm/aiter", "rocm/aiter" if name == "mi300x" else "rocm/ck")
    assert hwfuse.explain(GEMM, device=device, is_preshuffled=True).chosen == "rocm/aiter"
    quant = hwfuse.explain("rms_norm_fp8_group_quant", device=device)
    assert "experimental" in quant.rejected["rocm/aiter"][0]


@BOTH
def test_experimental_adapter_runs_when_it_is_named(arch):
    """Who accepts that a NaN is lost says so, by op."""
    with hwfuse.using(rms_norm_fp8_group_quant=["rocm/aiter", "..."]):
        decision = hwfuse.explain("rms_norm_fp8_group_quant", device=f"rocm:{arch}")
    assert decision.chosen == "rocm/aiter"


@BOTH
@pytest.mark.parametrize("name", ["qwen3_next", "gemma4", "kimi_linear"])
def test_patched_model_picks_amd_code_with_no_change(name, arch, installed):
    """The demo's models: the same calls run other code, and the logits differ by rounding."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from hwfuse.integrations import _tiny
    from hwfuse.integrations import transformers as integration

    installed("head", arch)
    model = getattr(_tiny, f"tiny_{name}")(dtype=torch.bfloat16)
    ids = torch.tensor([[5, 17, 101, 7, 64, 30, 9, 88]])
    with torch.no_grad():
        stock = model(ids).logits
        integration.patch(model)
        with pretend(f"rocm:{arch}"), hwfuse.record() as record:
            found = model(ids).logits
    assert record.calls
    assert {identifier.partition("/")[0] for _, identifier in record.calls} == {"rocm"}
    assert (found - stock).abs().max() < 5e-2


@BOTH
def test_fp8_layer_runs_amd_code_in_the_flavour_of_the_arch(arch, installed):
    """A checkpoint's e4m3fn weight, converted by `packing` for gfx942; the layer is the same."""
    installed("0.1.7", arch)
    generator = torch.Generator().manual_seed(0)
    layer = FP8BlockLinear(256, 80)
    weight = torch.randn(80, 256, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(1, 2, generator=generator) + 0.5
    x = torch.randn(5, 256, generator=generator).bfloat16()
    wanted = x.float() @ (weight.float() * scale.repeat_interleave(128, dim=1)).t()
    if arch == "gfx942":
        weight, scale = packing.fn_to_fnuz(weight, scale)
    layer.weight.data, layer.weight_scale_inv.data = weight, scale
    with torch.no_grad(), pretend(f"rocm:{arch}"), hwfuse.record() as record:
        found = layer(x)
    assert record.calls[GEMM, "rocm/aiter"] == 1
    assert ((found - wanted).norm() / wanted.norm()) < 0.05


@BOTH
def test_fact_of_dtype_and_arch_does_not_grow_the_memo(arch, installed):
    """One entry serves every number of rows, though the flavour's fact speaks of the arch."""
    installed("head", arch)
    op = hwfuse.op(GEMM)
    sizes = []
    with pretend(f"rocm:{arch}"), torch.no_grad():
        for m in (1, 2, 3, 5, 70):
            inputs = op.spec.make_inputs(m=m, n=64, k=256, is_preshuffled=True)
            assert hwfuse.explain(GEMM, **inputs).chosen == "rocm/aiter"
            op(**inputs)
            sizes.append(len(op._memo[1]))
    assert sizes[-1] == sizes[1]

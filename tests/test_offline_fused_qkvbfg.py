"""What the Triton kernels of fused_qkvbfg become on each arch: compiled here."""

import functools

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton

from hwfuse.ops import fused_qkvbfg as spec
from hwfuse.testing._offline import (
    SHARED_LIMIT,
    compile_launch,
    contract_breaches,
    recorded_launches,
)
from hwfuse_triton import fused_qkvbfg as shared

VECTOR = {
    "sm": r"LDGSTS\.E(\.BYPASS)?(\.LTC128B)?\.128.*|LDG\.E\.128.*",
    "gf": r"(buffer|global)_load_dwordx4",
}
TENSOR_CORES = {"sm80": "HMMA.*", "sm90": "HGMMA.*|HMMA.*", "sm100": "UTCHMMA.*|HMMA.*"}


def on(arch, *more):
    """Parametrise with an arch that this Triton may have no compiler for."""
    name = "nvidia" if arch.startswith("sm") else "amd"
    lacking = name not in triton.backends.backends
    mark = pytest.mark.skipif(lacking, reason=f"this Triton has no compiler for {arch}")
    return pytest.param(arch, *more, marks=mark)


@functools.cache
def compiled(arch, m, num_heads=8, **keywords):
    """Compile both launches of one call as they would be on this arch."""
    arguments = spec.make_inputs(m=m, num_heads=num_heads, **keywords)
    with recorded_launches() as launches:
        shared.fused_qkvbfg(**arguments, wave=32 if arch.startswith("sm") else 64)
    pdl = {"PDL": True, "launch_pdl": True} if arch in ("sm90", "sm100") else {}
    return [(launch, compile_launch(launch, arch, **pdl)) for launch in launches]


def assert_fits(arch, results):
    """No spills, no more shared memory than there is, wide loads, the launch contract."""
    assert len(results) == 2
    for launch, result in results:
        assert result.spills == 0
        assert result.shared <= SHARED_LIMIT[arch]
        assert result.count(VECTOR[arch[:2]]) > 0
        assert contract_breaches(launch, result) == []


@pytest.mark.parametrize("arch", [on(arch) for arch in SHARED_LIMIT])
@pytest.mark.parametrize("m", [1, 16, 32, 64])
def test_projections_of_few_tokens_fit_every_arch(m, arch):
    """The tiles of a tensor parallel slice: halves of the channels, long pipelines."""
    assert_fits(arch, compiled(arch, m))


@pytest.mark.parametrize(("arch", "m"), [on("sm80", 64), on("sm90", 32), on("sm100", 16)])
def test_projections_with_all_heads_fit(arch, m):
    """The tiles of a whole layer."""
    assert_fits(arch, compiled(arch, m, num_heads=32, hidden_size=512))


@pytest.mark.parametrize("arch", [on("gfx942"), on("gfx950")])
@pytest.mark.parametrize("head_dim", [128, 256])
def test_projections_of_many_tokens_fit_amd(head_dim, arch):
    """AMD has no other implementation above 64 tokens; a low rank of 256 takes two steps."""
    results = compiled(arch, 256, num_heads=2, hidden_size=512, head_dim=head_dim)
    assert_fits(arch, results)
    assert results[1][1].count("v_mfma.*") > 0


@pytest.mark.parametrize("arch", [on("sm90"), on("gfx942")])
@pytest.mark.parametrize("m", [1, 64])
def test_projections_in_float32_fit(m, arch):
    """Float32 is multiplied exactly, outside of NVIDIA's tensor cores, and spills nothing."""
    assert_fits(arch, compiled(arch, m, hidden_size=512, dtype=torch.float32))


@pytest.mark.parametrize("arch", [on(arch) for arch in TENSOR_CORES])
def test_projections_of_16_tokens_use_tensor_cores(arch):
    """Both launches do; on sm90 the weights go from shared memory straight into them."""
    for _, result in compiled(arch, 16):
        assert result.count(TENSOR_CORES[arch]) > 0
    if arch == "sm90":
        assert compiled(arch, 16)[1][1].count("HGMMA.*") > 0


@pytest.mark.parametrize("arch", [on("sm90"), on("sm100")])
def test_second_launch_starts_only_when_the_tokens_are_there(arch):
    """The first waits before it lets the second start: its columns may then read x at once."""
    (_, first), (_, second) = compiled(arch, 16)
    assert first.asm.index("ACQBULK") < first.asm.index("PREEXIT")
    assert second.asm.index("PREEXIT") < second.asm.index("ACQBULK")


@pytest.mark.parametrize("arch", [on("sm90")])
def test_single_token_asks_for_its_weights_before_it_waits(arch):
    """That is what M = 1 lives on: some loads later cost 1.2 us of 6.1 on an H200."""
    _, result = compiled(arch, 1)[1]
    text = result.asm
    before = text[: text.index("FFMA")]
    assert before.count("LDG.E.128") >= 6

"""What the Triton kernels of the w4a8 mixture become on each arch: compiled here, without one."""

import functools
from importlib import import_module

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton

from hwfuse.testing._offline import (
    SHARED_LIMIT,
    compile_launch,
    contract_breaches,
    recorded_launches,
)
from hwfuse_triton import moe_rows, w4a8_grouped_gemm, w4a8_moe_prep


def on(arch):
    """Parametrise with an arch that this Triton may have no compiler for."""
    name = "nvidia" if arch.startswith("sm") else "amd"
    lacking = name not in triton.backends.backends
    mark = pytest.mark.skipif(lacking, reason=f"this Triton has no compiler for {arch}")
    return pytest.param(arch, marks=mark)


ARCHES = [on(arch) for arch in SHARED_LIMIT]
HOPPER = ("sm90", "sm100")
VECTOR = {
    "sm": (r"LDG\.E\.128", r"STG\.E\.(64|128)"),
    "gf": (r"(buffer|global)_load_dwordx4", r"(buffer|global)_store_dwordx[24]"),
}
# What to call, and how many kernels it launches.
ROWS = {
    "moe_input_scale": 2,
    "moe_permute_fp8_quant": 1,
    "silu_mul_fp8_quant": 1,
    "moe_unpermute_reduce": 1,
}


def launches(module, op, arch, **keywords):
    """Record what one call would launch on *arch*."""
    backend = "hwfuse_rocm" if arch.startswith("gf") else "hwfuse_cuda"
    implementation = import_module(f"{backend}.triton_ops.{op}")
    arguments = import_module(f"hwfuse.ops.{op}").make_inputs(device="meta", **keywords)
    with pytest.MonkeyPatch.context() as patch, recorded_launches() as found:
        if arch == "sm80" and hasattr(module, "rounds"):
            patch.setattr(module, "rounds", lambda *_: False)
        getattr(implementation, op)(**arguments)
    return found


def compiled(launch, arch):
    """Compile as a launch on *arch* would."""
    options = {"PDL": True, "launch_pdl": True} if arch in HOPPER else {}
    if "HAS_PTX" in launch.kwargs:
        options["HAS_PTX"] = arch in HOPPER
    return compile_launch(launch, arch, **options)


def assert_sound(launch, result, registers):
    """No spills, what fits, and nothing assumed of the arguments' values."""
    assert result.spills == 0
    assert result.shared <= SHARED_LIMIT[result.arch]
    assert result.registers <= registers
    assert contract_breaches(launch, result) == []


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("op", ROWS)
def test_rows_on_every_arch_fit_and_move_vectors(op, arch):
    """Rows go through loads of 16 bytes and stores of 8 or 16; many programs fit side by side."""
    found = launches(moe_rows, op, arch, m=64)
    assert len(found) == ROWS[op]
    for launch in found:
        result = compiled(launch, arch)
        assert_sound(launch, result, 128)
    result = compiled(found[0], arch)
    loads, stores = VECTOR[arch[:2]]
    assert result.count(loads) >= 2
    assert result.count(stores) >= (op != "moe_input_scale")


@pytest.mark.parametrize("arch", ARCHES)
def test_dynamic_activation_scale_on_every_arch_fits(arch):
    """The kernel that only the whole layer launches."""
    rows = torch.empty(64, 512, dtype=torch.bfloat16, device="meta")
    offsets = torch.empty(5, dtype=torch.int32, device="meta")
    with recorded_launches() as found:
        moe_rows.silu_mul_scale(rows, offsets, wave=64 if arch.startswith("gf") else 32)
    result = compiled(found[0], arch)
    assert_sound(found[0], result, 64)
    assert result.count(VECTOR[arch[:2]][0]) >= 2


@pytest.mark.parametrize("arch", ARCHES)
def test_prep_on_every_arch_fits(arch):
    """One launch for few routes, three for many."""
    few = launches(w4a8_moe_prep, "w4a8_moe_prep", arch, m=64)
    many = launches(w4a8_moe_prep, "w4a8_moe_prep", arch, m=4096)
    assert (len(few), len(many)) == (1, 3)
    for launch in few + many:
        assert_sound(launch, compiled(launch, arch), 128)


# Rows of 32 experts, and the registers that the tile may take: 2 programs of 4 warps, 1 of 8.
TILES = {"ahead": (64, 128), "16": (256, 128), "32": (1024, 255), "64": (4096, 255)}
TILES |= {"128": (32768, 255)}
DOT = {
    "sm80": r"HMMA\.16816\.F32",
    "sm90": r"QGMMA\.64x\d+x32\.F32\.E4M3\.E4M3",
    "sm100": r"UTCQMMA",
    "gfx942": r"v_mfma_f32_\d+x\d+x\d+_f16",
    "gfx950": r"v_mfma_f32_\d+x\d+x\d+_f16",
}


@functools.cache
def gemm(m, arch, **sizes):
    """Compile the kernel for some rows of 32 experts."""
    sizes = {"n": 256, "k": 1024, **sizes}
    with pytest.MonkeyPatch.context() as patch:
        if arch not in HOPPER:
            patch.setattr(w4a8_grouped_gemm, "_has_room", lambda _: False)
        (launch,) = launches(w4a8_grouped_gemm, "w4a8_grouped_gemm", arch, m=m, **sizes)
    return launch, compiled(launch, arch)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("name", TILES)
def test_gemm_on_every_arch_fits_and_uses_tensor_cores(name, arch):
    """Products of fp8 where PTX can make the weights, of float16 elsewhere."""
    rows, registers = TILES[name]
    launch, result = gemm(rows, arch)
    # On AMD 512 registers are one wave per SIMD; some tiles take half of them.
    assert_sound(launch, result, 256 if arch.startswith("gf") else registers)
    assert result.count(DOT[arch]) > 0
    assert not result.count(r"BPT\.TRAP") or result.registers > 16  # a stub of ptxas


@pytest.mark.parametrize("arch", [on("sm80"), on("sm90"), on("sm100")])
def test_gemm_on_nvidia_loads_ahead_past_the_registers(arch):
    """Weights and activations of the next steps are on their way to shared memory."""
    _, result = gemm(64, arch)
    assert result.count(r"LDGSTS\.E\.BYPASS\.128") > 8


def test_gemm_on_hopper_makes_weights_four_bytes_at_a_time():
    """Code on single bytes would take three times as many instructions."""
    _, result = gemm(64, "sm90")
    words = 2 * 64 * 64 // 4 * 4 // 128  # of codes per thread and step of four groups
    assert result.count(r"LOP3.*|SHF.*") < 7 * words


@pytest.mark.parametrize("arch", [on("sm90"), on("sm100")])
def test_gemm_with_dependent_launch_waits_before_it_reads(arch):
    """The offsets and the rows are written by the kernels before."""
    _, result = gemm(64, arch)
    wait, start = result.asm.index("ACQBULK"), result.asm.index("PREEXIT")
    assert wait < start
    assert wait < result.asm.index("LDG")


@pytest.mark.parametrize("arch", [on("sm90"), on("gfx942")])
def test_gemm_with_other_rows_shares_one_specialisation(arch):
    """The number of rows is not compiled in, nor a stride of 1."""
    keys = {
        (tuple(result.signature.items()), repr(result.hints))
        for _, result in (gemm(m, arch, row_pad=pad) for m, pad in ((1, 0), (16, 16), (17, 112)))
    }
    assert len(keys) == 1

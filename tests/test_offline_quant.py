"""What the kernels of the fp8_group_quant family become on each arch: compiled, never run."""

import functools
import importlib
from unittest import mock

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
from hwfuse_triton import _fp8, norm_group_quant

# Of each: the op, make_inputs' keywords, how many loads and stores of 16 bytes the code for NVIDIA
# has (2048 elements in 4 warps, a row of 7168 in 8 or 4), and the most registers of a thread.
CASES = {
    "plain": ("fp8_group_quant", {}, (2, 1), 64),
    "silu": ("silu_mul_fp8_group_quant", {}, (4, 1), 64),
    "norm": ("rms_norm_fp8_group_quant", {"scale_layout": "column_tma"}, (8, 0), 96),
    "add and": ("add_rms_norm_and_fp8_group_quant", {}, (12, 8), 128),
    "add and, many rows": ("add_rms_norm_and_fp8_group_quant", {}, (21, 14), 160),
    "float32": ("rms_norm_fp8_group_quant", {"dtype": torch.float32}, (14, 0), 96),
    "long row": ("rms_norm_and_fp8_group_quant", {"m": 2, "k": 65536}, (24, 3), 128),
}
VECTOR = {
    "sm": (r"LDG\.E\.128.*", r"STG\.E\.128.*"),
    "gf": (r"(buffer|global)_load_dwordx4", r"(buffer|global)_store_dwordx4"),
}
CONVERSION = {
    "sm80": None,
    "sm90": r"F2FP\.SATFINITE\.E4M3.*",
    "sm100": r"F2FP\.SATFINITE\.E4M3.*",
    "gfx942": r"v_cvt_pk_fp8_f32.*",
    "gfx950": r"v_cvt_scalef32_pk_fp8_f32.*",
}


def on(arch, *more):
    """Parametrise with an arch that this Triton may have no compiler for."""
    name = "nvidia" if arch.startswith("sm") else "amd"
    lacking = name not in triton.backends.backends
    mark = pytest.mark.skipif(lacking, reason=f"this Triton has no compiler for {arch}")
    return pytest.param(arch, *more, marks=mark)


def launch(op, arch, few_elements=None, **keywords):
    """Record the launch that the backend of an arch makes."""
    backend = "cuda" if arch.startswith("sm") else "rocm"
    function = getattr(importlib.import_module(f"hwfuse_{backend}.triton_ops.{op}"), op)
    spec = importlib.import_module(f"hwfuse.ops.{op}")
    fp8 = torch.float8_e4m3fnuz if arch == "gfx942" else torch.float8_e4m3fn
    arguments = spec.make_inputs(**{"m": 64, "k": 7168, "fp8": fp8, **keywords})
    most = norm_group_quant.FEW_ELEMENTS if few_elements is None else few_elements
    with (
        recorded_launches() as launches,
        mock.patch.object(norm_group_quant, "FEW_ELEMENTS", most),
        mock.patch.object(_fp8, "rounds", return_value=arch != "sm80"),
    ):
        function(**arguments)
    (only,) = launches
    return only


@functools.cache
def compiled(name, arch):
    """Compile one case as a launch on this arch would."""
    op, keywords, *_ = CASES[name]
    recorded = launch(op, arch, 0 if "many" in name else None, **keywords)
    pdl = {"PDL": True, "launch_pdl": True} if arch in ("sm90", "sm100") else {}
    return recorded, compile_launch(recorded, arch, **pdl)


@pytest.mark.parametrize("arch", [on(arch) for arch in SHARED_LIMIT])
@pytest.mark.parametrize("name", CASES)
def test_quantisation_on_every_arch_fits_registers_and_converts_in_hardware(name, arch):
    """No spills, little shared memory, full-width loads, the instruction that the arch has."""
    _, _, (loads, stores), registers = CASES[name]
    recorded, result = compiled(name, arch)
    assert result.spills == 0
    assert result.shared <= (32 * 1024 if name == "long row" else 1024)
    load, store = VECTOR[arch[:2]]
    if arch.startswith("sm"):
        assert result.registers <= registers
        assert (result.count(load), result.count(store)) == (loads, stores)
    else:
        assert result.registers <= 256  # of 512
        assert result.count(load) > 0
        assert result.count(store) > 0 or not stores
        assert recorded.kwargs["num_warps"] * 64 <= 512
    if CONVERSION[arch]:
        assert result.count(CONVERSION[arch]) > 0
    assert contract_breaches(recorded, result) == []


@pytest.mark.parametrize("arch", [on("sm90"), on("sm100")])
def test_norm_with_dependent_launch_fetches_the_weight_before_it_waits(arch):
    """What no kernel writes is loaded before the wait, everything else behind it."""
    _, result = compiled("norm", arch)
    before, after = result.asm.split("ACQBULK")
    assert before.count("LDG") == after.count("LDG") == 4
    assert "STG" not in before
    assert after.index("PREEXIT") < after.index("LDG")


@pytest.mark.parametrize("arch", [on("sm90"), on("gfx942")])
@pytest.mark.parametrize("op", ["fp8_group_quant", "add_rms_norm_fp8_group_quant"])
def test_launches_with_other_sizes_and_strides_share_one_specialisation(op, arch):
    """One binary serves every M and every stride that is a multiple of 16 bytes."""
    keys = set()
    for m, row_pad in [(1, 0), (17, 8)]:
        result = compile_launch(launch(op, arch, m=m, k=256, row_pad=row_pad), arch)
        keys.add((tuple(result.signature.items()), repr(result.hints)))
    assert len(keys) == 1


def test_type_without_an_instruction_is_rounded_in_software():
    """NVIDIA has none for e4m3fnuz: the kernel gets bytes to write."""
    spec = importlib.import_module("hwfuse.ops.fp8_group_quant")
    function = importlib.import_module("hwfuse_cuda.triton_ops.fp8_group_quant").fp8_group_quant
    with recorded_launches() as launches:
        function(**spec.make_inputs(m=4, fp8=torch.float8_e4m3fnuz))
    assert launches[0].args[1].dtype == torch.uint8
    assert launches[0].kwargs["CLAMP"]

"""What the Triton kernels of the head norms become on each arch: compiled here."""

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
from hwfuse_triton import head_norms as shared

# make_inputs' keywords, and the 16-byte loads of heads and of weights that the code must have on
# NVIDIA: for q, k and v 4 of each head tile in small tiles, 2 in large ones.
VARIANTS = {
    "small": ("qkv_rms_norm", {"m": 8}, 14),
    "large": ("qkv_rms_norm", {"m": 512}, 8),
    "large in place": ("qkv_rms_norm_", {"m": 512}, 8),
    "k is v": ("q_keqv_rms_norm", {"m": 8}, 12),
    "q alone": ("q_rms_norm", {"m": 8, "num_q_heads": 32}, 5),
    "masked": ("qkv_rms_norm", {"m": 8, "head_dim": 96}, 20),
    "float32": ("qkv_rms_norm", {"m": 8, "dtype": torch.float32}, 16),
    "widest": ("q_rms_norm", {"m": 1, "num_q_heads": 1, "head_dim": 32768}, 8),
}
VECTOR = {
    "sm": (r"LDG\.E\.128.*", r"STG\.E\.128"),
    "gf": (r"(buffer|global)_load_dwordx4", r"(buffer|global)_store_dwordx4"),
}


def on(arch, *more):
    """Parametrise with an arch that this Triton may have no compiler for."""
    name = "nvidia" if arch.startswith("sm") else "amd"
    lacking = name not in triton.backends.backends
    mark = pytest.mark.skipif(lacking, reason=f"this Triton has no compiler for {arch}")
    return pytest.param(arch, *more, marks=mark)


def launch(op, wave=32, **keywords):
    """Record the launch of one call."""
    arguments = import_module(f"hwfuse.ops.{op}").make_inputs(**keywords)
    with recorded_launches() as launches:
        getattr(shared, op)(**arguments, wave=wave)
    (only,) = launches
    return only


@functools.cache
def compiled(name, arch):
    """Compile one variant as a launch on this arch would."""
    op, keywords, _ = VARIANTS[name]
    recorded = launch(op, 32 if arch.startswith("sm") else 64, **keywords)
    pdl = {"PDL": True, "launch_pdl": True} if arch in ("sm90", "sm100") else {}
    return recorded, compile_launch(recorded, arch, **pdl)


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        *(on("sm90", name) for name in VARIANTS),
        *(on("gfx942", name) for name in VARIANTS),
        *(on(arch, name) for arch in ("sm80", "sm100", "gfx950") for name in ("large", "k is v")),
    ],
)
def test_norms_on_every_arch_fit_and_move_16_bytes_at_a_time(arch, name):
    """No spills, wide loads and stores, and nothing assumed but types and aligned pointers."""
    recorded, result = compiled(name, arch)
    loads, stores = VECTOR[arch[:2]]
    assert result.spills == 0
    assert result.shared <= SHARED_LIMIT[arch]
    if arch.startswith("sm"):
        assert result.count(loads) == VARIANTS[name][2]
    assert result.count(loads) > 0
    assert result.count(stores) > 0
    assert contract_breaches(recorded, result) == []


@pytest.mark.parametrize("arch", [on("sm90"), on("gfx942")])
@pytest.mark.parametrize("name", ["small", "k is v", "masked"])
def test_small_tiles_lie_in_one_warp(name, arch):
    """What a warp holds is added up by it alone: no shared memory, no barrier."""
    assert compiled(name, arch)[1].shared == 0


@pytest.mark.parametrize("arch", [on("sm90"), on("gfx942")])
def test_norms_of_odd_strides_load_narrow_and_store_wide(arch):
    """Rows at odd addresses cost single loads, and never a misaligned access."""
    loads, stores = VECTOR[arch[:2]]
    recorded = launch("q_rms_norm", 32 if arch == "sm90" else 64, m=8, num_q_heads=32, row_pad=1)
    result = compile_launch(recorded, arch)
    assert result.count(loads) <= 4  # those of the weight
    assert result.count(stores) > 0
    assert result.spills == 0


@pytest.mark.parametrize("arch", [on("sm90"), on("sm100")])
def test_norms_with_dependent_launch_wait_before_they_read(arch):
    """The wait for the kernel before comes first; only then may the next one start."""
    asm = compiled("large", arch)[1].asm
    wait, start = asm.index("ACQBULK"), asm.index("PREEXIT")
    assert wait < start
    assert wait < asm.index("LDG")
    assert wait < asm.index("STG")

"""What the Triton kernels become on each arch: compiled here, no accelerator needed."""

import functools

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

from hwfuse.ops import fused_qkvzba as spec
from hwfuse.testing._offline import (
    SHARED_LIMIT,
    compile_launch,
    contract_breaches,
    recorded_launches,
)
from hwfuse_triton import fused_qkvzba as shared


def on(arch, *more):
    """Parametrise with an arch that this Triton may have no compiler for."""
    name = "nvidia" if arch.startswith("sm") else "amd"
    lacking = name not in triton.backends.backends
    mark = pytest.mark.skipif(lacking, reason=f"this Triton has no compiler for {arch}")
    return pytest.param(arch, *more, marks=mark)


ARCHES = [on(arch) for arch in SHARED_LIMIT]
PDL = {"PDL": True, "launch_pdl": True}
# make_inputs' keywords, and how many 16-byte loads of rows the code must have: on NVIDIA two per
# thread for each of q or k, v, z (four of float32), on AMD with its 256 threads half as many.
VARIANTS = {
    "interleaved": ({}, 6),
    "contiguous": ({"layout": "contiguous", "num_v_heads": 64}, 6),
    "three value heads": ({"num_v_heads": 48}, 6),
    "few heads": ({"num_k_heads": 2, "num_v_heads": 4}, 6),
    "wider rows": ({"row_pad": 8}, 6),
    "masked width": ({"head_k_dim": 96, "head_v_dim": 96}, 6),
    "float32": ({"dtype": torch.float32}, 12),
}
VECTOR = {
    "sm": (r"LDG\.E\.128", r"STG\.E\.128"),
    "gf": (r"(buffer|global)_load_dwordx4", r"(buffer|global)_store_dwordx4"),
}


def launch(**keywords):
    """Record the launch of one call."""
    with recorded_launches() as launches:
        shared.fused_qkvzba(**spec.make_inputs(m=64, **keywords))
    (only,) = launches
    return only


@functools.cache
def compiled(name, arch):
    """Compile one variant as a launch on this arch would."""
    recorded = launch(**VARIANTS[name][0])
    hopper = arch in ("sm90", "sm100")
    return recorded, compile_launch(recorded, arch, **(PDL if hopper else {}))


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("name", VARIANTS)
def test_split_on_every_arch_fits_and_moves_16_bytes_at_a_time(name, arch):
    """No spills, no shared memory, few registers, and rows go through full-width vectors."""
    _, result = compiled(name, arch)
    loads, stores = VECTOR[arch[:2]]
    vectors = VARIANTS[name][1] // (1 if arch.startswith("sm") else 2)
    assert result.spills == 0
    assert result.shared == 0
    assert result.registers <= 64
    assert result.count(loads) == vectors
    assert result.count(stores) >= vectors


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("name", ["interleaved", "contiguous"])
def test_split_assumes_nothing_but_types_and_aligned_pointers(name, arch):
    """One binary serves every M and every stride: no value of an int is compiled in."""
    assert contract_breaches(*compiled(name, arch)) == []


@pytest.mark.parametrize("arch", ARCHES)
def test_split_of_odd_strides_loads_narrow_and_stores_wide(arch):
    """Rows at odd addresses cost single loads, and never a misaligned access."""
    result = compile_launch(launch(row_pad=1), arch)
    loads, stores = VECTOR[arch[:2]]
    assert result.count(loads) == 0
    assert result.count(stores) > 0
    assert result.spills == 0


@pytest.mark.parametrize("arch", [on("sm90"), on("sm100")])
def test_split_with_dependent_launch_waits_before_it_reads(arch):
    """The wait for the kernel before comes first; only then may the next one start."""
    _, result = compiled("interleaved", arch)
    wait, start = result.asm.index("ACQBULK"), result.asm.index("PREEXIT")
    assert wait < start
    assert wait < result.asm.index("LDG")
    assert wait < result.asm.index("STG")


@pytest.mark.parametrize("arch", [on("sm90"), on("gfx942")])
def test_launches_with_other_sizes_and_strides_share_one_specialisation(arch):
    """M = 1 and a stride of 1 in units are not folded into constants."""
    keys = set()
    for m, row_pad in [(1, 0), (16, 0), (17, 8), (1022, 16)]:
        with recorded_launches() as launches:
            shared.fused_qkvzba(**spec.make_inputs(m=m, row_pad=row_pad))
        result = compile_launch(launches[0], arch)
        keys.add((tuple(result.signature.items()), repr(result.hints)))
    assert len(keys) == 1


def test_launch_of_one_row_ignores_its_stride():
    """A single row cut from a wider tensor has a meaningless stride; decode must stay fast."""
    with recorded_launches() as launches:
        shared.fused_qkvzba(**spec.make_inputs(m=1, row_pad=1))
    assert launches[0].kwargs["STRIDE_UNIT"] == 8


@triton.jit
def trap_kernel(x_ptr, n, stride, BLOCK: tl.constexpr):
    """Multiply by ints that Triton may specialise on."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + i * stride, 0.0, mask=i < n)


@pytest.mark.parametrize("arch", [on("sm90"), on("gfx942")])
def test_kernel_with_ordinary_ints_breaches_the_launch_contract(arch):
    """The check bites: a folded 1, a hint on a multiple of 16, a misaligned pointer."""
    with recorded_launches() as launches:
        trap_kernel[(1,)](torch.empty(17)[1:], 16, 1, BLOCK=16)
    breaches = contract_breaches(launches[0], compile_launch(launches[0], arch))
    assert breaches == [
        "x_ptr: compiled for a pointer that is no multiple of 16",
        "n: not in do_not_specialize",
        "n: tt.divisibility is assumed of its value",
        "stride: compiled as constexpr, needed i32 or fp32",
    ]


@triton.jit
def hungry_kernel(x_ptr, BLOCK: tl.constexpr):
    """Keep a tile in registers and pass it through shared memory."""
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i[:, None] * BLOCK + i[None, :])
    tl.store(x_ptr + i[:, None] + i[None, :] * BLOCK, x * tl.sum(x))


@pytest.mark.parametrize(
    ("arch", "limit"), [on("sm90", {"maxnreg": 32}), on("gfx942", {"waves_per_eu": 8})]
)
def test_kernel_with_too_few_registers_shows_spills_and_shared_memory(arch, limit):
    """A compiler mentions neither; the numbers that the other tests trust can be other than 0."""
    with recorded_launches() as launches:
        hungry_kernel[(1,)](torch.empty(64 * 64), BLOCK=64, num_warps=1)
    result = compile_launch(launches[0], arch, **limit)
    assert result.spills > 0
    assert result.shared > 0

"""w4a8_grouped_gemm in CUDA C++: what it compiles to, and what runs for which call."""

from __future__ import annotations

import re
import subprocess

import pytest
import torch

import hwfuse
from hwfuse import _compilers, _state, _variants
from hwfuse_cuda import _compile, _cpp, _driver
from hwfuse_cuda.cpp_ops import w4a8_grouped_gemm as implementation

SPEC = hwfuse.op("w4a8_grouped_gemm").spec
SHARED_OF_SM, REGISTERS_OF_SM = 233472, 65536


def all_in_one(kernels):
    """Return one program of all variants, because starting the compiler is what takes long."""
    source = _compile.expand("w4a8_grouped_gemm.cu")
    parts = []
    for i, kernel in enumerate(kernels):
        macros = {**kernel.defines, "w4a8_grouped_gemm": f"kernel_{i}"}
        parts += [f"#define {name} {value}" for name, value in macros.items()]
        parts += [f"namespace n{i} {{", source, "}", *(f"#undef {name}" for name in macros)]
    return "\n".join(parts)


def test_kernels_spill_nothing_and_run_as_many_at_a_time_as_is_declared(tmp_path):
    """No product waits for the one before; registers and shared memory suffice for all blocks."""
    nvcc = next((one for one in _compilers.compilers() if one.kind == "nvcc"), None)
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    program = tmp_path / "all.cu"
    program.write_text(all_in_one(map(implementation.kernel, implementation.KERNELS)))
    command = [nvcc.path, "-cubin", "-arch=sm_90a", *_compile.OPTIONS, "-Xptxas", "-v"]
    command += ["-o", tmp_path / "all.cubin", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "wgmma" not in done.stderr  # the warning that products are serialised
    reports = re.findall(
        r"'kernel_(\d)' for .*\n.*\n +0 bytes stack frame, 0 bytes spill stores, 0 bytes spill "
        r"loads\n.*Used (\d+) registers.* (\d+) bytes smem",
        done.stderr,
    )
    assert len(reports) == len(implementation.KERNELS), done.stderr
    for index, registers, static in reports:
        chosen = implementation.KERNELS[int(index)]
        shared = chosen.shared + int(static) + 1024  # the last of the driver's own
        assert shared * chosen.ctas_per_sm <= SHARED_OF_SM, chosen
        assert int(registers) * chosen.threads * chosen.ctas_per_sm <= REGISTERS_OF_SM, chosen


SIZES = [
    (m, n, k, e)
    for e in (1, 32, 256)
    for n, k in ((512, 7168), (7168, 256), (64, 128), (4096, 384))
    for rows in (0, 1, 3, 4, 5, 26, 27, 28, 29, 128)
    for m in {max(1, rows * e - 1), rows * e + 1}
]


def test_variant_that_runs_is_the_one_that_is_declared():
    """The first fact that holds names what the wrapper takes."""
    registered = _state.registry().implementations("w4a8_grouped_gemm")["cuda/cpp"]
    facts = _variants.read(registered)
    assert len(facts) == len(implementation.KERNELS)
    seen = set()
    for m, n, k, e in SIZES:
        values = {"m": m, "n": n, "k": k, "num_experts": e}
        declared = next(i for i, fact in enumerate(facts.values()) if fact.holds(values))
        assert implementation.variant(m, n, k, e) is implementation.KERNELS[declared]
        seen.add(declared)
    assert len(seen) == len(facts)


@pytest.fixture
def launches(monkeypatch):
    """The launches of calls on CPU tensors: (kernel, blocks, values); nothing runs."""
    found = []
    monkeypatch.setattr(
        _cpp.Kernel, "__call__", lambda self, _d, blocks, *v: found.append((self, blocks, v))
    )
    monkeypatch.setattr(_cpp, "num_sms", lambda _device: 132)
    monkeypatch.setattr(_driver, "tensor_map", lambda *_a, **_k: bytes(128))
    implementation._plan.cache_clear()
    implementation._rows_of_a.cache_clear()
    yield found
    implementation._plan.cache_clear()
    implementation._rows_of_a.cache_clear()


def test_call_passes_what_the_kernel_takes(launches):
    """Descriptors for all sizes of a tile, whole clusters of blocks, and the sizes."""
    inputs = SPEC.make_inputs(m=40, n=192, k=384, num_experts=3, is_repacked=True)
    rows = implementation.w4a8_grouped_gemm(**inputs)
    assert (rows.shape, rows.dtype) == ((40, 192), torch.bfloat16)
    ((kernel, blocks, (maps, *pointers, num_experts, n, k)),) = launches
    assert kernel is implementation.kernel(implementation.SHARED_BY_4)
    assert (blocks, len(maps), num_experts, n, k) == (264, 128, 3, 192, 384)
    names = ("b", "a_scale", "expert_offsets")
    assert pointers == [*(inputs[name].data_ptr() for name in names), rows.data_ptr()]


def test_call_without_rows_launches_nothing(launches):
    """The empty result has the op's format."""
    inputs = SPEC.make_inputs(m=0, n=64, k=256, num_experts=2, is_repacked=True)
    assert implementation.w4a8_grouped_gemm(**inputs).shape == (0, 64)
    assert launches == []


def test_plain_weight_is_rejected_with_the_reason():
    """It runs elsewhere and is no garbage."""
    with hwfuse.testing.pretend("cuda:sm90"):
        plain = hwfuse.explain("w4a8_grouped_gemm", **SPEC.make_inputs(m=4, n=64, k=256))
    assert any("b.ndim == 4" in reason for reason in plain.rejected["cuda/cpp"])

"""The CUDA C++ kernel of w4a8_moe_prep: what it compiles to, and how its wrapper launches it."""

from __future__ import annotations

import re
import subprocess

import pytest

import hwfuse
from hwfuse import _compilers, _state, _variants
from hwfuse_cuda import _compile, _cpp
from hwfuse_cuda._cubin import parameter_sizes
from hwfuse_cuda.cpp_ops import w4a8_moe_prep

HEAVIEST = """
#define THREADS 1024
#define CLUSTER 16
#define BITS 10
#define ROUNDS 8
#define STAGED 1
#define PDL 1
"""


@pytest.fixture
def launches(monkeypatch):
    """The launches of calls on CPU tensors: (kernel, blocks, values); nothing runs."""
    found = []
    monkeypatch.setattr(
        _cpp.Kernel, "__call__", lambda self, _d, blocks, *v: found.append((self, blocks, v))
    )
    monkeypatch.setattr(_cpp.Kernel, "max_cluster", lambda _self, _device: 16)
    return found


def call(**keywords):
    """Call the implementation on the inputs that these keywords make."""
    make_inputs = hwfuse.op("w4a8_moe_prep").spec.make_inputs
    return w4a8_moe_prep.w4a8_moe_prep(**make_inputs(**keywords))


def test_kernel_on_sm90_and_sm100_spills_nothing(tmp_path):
    """Registers suffice, and it takes the arguments that its wrapper passes."""
    triton = pytest.importorskip("triton", reason="cuobjdump comes with Triton")
    nvcc = next((one for one in _compilers.compilers() if one.kind == "nvcc"), None)
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    program = tmp_path / "prep.cu"
    program.write_text(HEAVIEST + _compile.expand("w4a8_moe_prep.cu"))
    targets = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in (90, 100)]
    result = tmp_path / "prep.fatbin"
    command = [nvcc.path, "-fatbin", *targets, *_compile.OPTIONS, "-o", result, program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    dump = triton.knobs.nvidia.cuobjdump.path
    usage = subprocess.check_output([dump, "-res-usage", result], text=True)
    assert re.findall(r"STACK:(\d+)", usage) == ["0"] * 2
    assert re.findall(r"LOCAL:(\d+)", usage) == ["0"] * 2
    subprocess.run([dump, "-xelf", "sm_90", result], cwd=tmp_path, capture_output=True, check=True)
    (cubin,) = tmp_path.glob("*.cubin")
    sizes = [8 if code in "Pq" else 4 for code in w4a8_moe_prep._TYPES]
    assert parameter_sizes(cubin.read_bytes(), "w4a8_moe_prep") == sizes


@pytest.mark.parametrize("routes", [768, 769, 4096, 4097])
def test_moe_prep_runs_the_variant_that_is_declared(launches, routes):
    """One block, a cluster of 8, a cluster of 16."""
    record = _state.registry().implementations("w4a8_moe_prep")["cuda/cpp"]
    running = _variants.running(record, {"m": routes, "topk": 1})
    call(m=routes, topk=1)
    kernel, blocks, _ = launches[-1]
    assert running.startswith("one block" if blocks == 1 else f"a cluster of {blocks} blocks")
    assert kernel.cluster == blocks


@pytest.mark.parametrize("num_experts", [1, 256, 513, 1024])
@pytest.mark.parametrize("m", [0, 1, 100, 3000, 65536])
def test_moe_prep_covers_all_routes_within_what_a_card_has(launches, m, num_experts):
    """Warps and rounds reach every route, threads every pair of experts; memory is enough."""
    call(m=m, topk=8, num_experts=num_experts)
    kernel, blocks, values = launches[-1]
    threads, rounds = kernel.defines["THREADS"], values[12]
    assert blocks * threads * rounds >= m * 8
    assert threads >= (num_experts + 1) // 2
    assert rounds * threads <= 65536  # what the 16-bit counters of a block can hold
    assert kernel.shared <= 227 * 1024
    assert kernel.defines["ROUNDS"] in (rounds, 0)

"""AMD's own aiter: its Triton kernels, our reference and the stand-in on the same inputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from hwfuse.testing import evidence

# What 0.1.7 has in Triton; head also has the preshuffled GEMM and the split.
OPS = (
    "rms_norm_fp8_group_quant",
    "add_rms_norm_fp8_group_quant",
    "flatten_fp8_group_quant",
    "fp8_blockscale_gemm",
    "fused_qkvbfg",
)
FUNCTIONS = (
    "fused_rms_fp8_group_quant",
    "fused_flatten_fp8_group_quant",
    "triton_gemm_a8w8_blockscale",
    "triton_batched_gemm_bf16",
)
CONTROLS = ("forward trick as its own inverse", "wrong flavour of fp8")
OF_HEAD = {
    "contract": ("fused_qkvzba",),
    "stand-in": (
        "gemm_a8w8_blockscale_bpreshuffle",
        "fused_qkvzba_split_reshape_cat_decode",
    ),
    "control": ("row-major scale", "unshuffled weight"),
}


@pytest.fixture(scope="module", params=["gfx942", "gfx950"])
def results(request, aiter_source, real_script, aiter_libraries):
    """Run AMD's code for one arch in a process of its own."""
    version, folder = aiter_source
    command = [sys.executable, str(real_script), request.param, str(folder), str(aiter_libraries)]
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    found = {(line["kind"], line["what"]): line for line in lines}

    def of(kind, names):
        wanted = names + (OF_HEAD.get(kind, ()) if version == "head" else ())
        return [(what, found[kind, what]) for what in wanted]

    of.arch, of.version = request.param, version
    return of


def test_amd_code_behind_the_adapters_agrees_with_the_reference(results):
    """All checks of the parity harness, on finite input, within each op's own tolerance."""
    for op, line in results("contract", OPS):
        by = f"aiter {results.version}"
        if op == "fp8_blockscale_gemm" and results.version == "0.1.7":
            by += ", plain b"  # its preshuffled GEMM is C++
        passed = line["count"] > 0 and not line["problems"]
        evidence.record(op, "rocm/aiter", results.arch, "interpreted", passed=passed, by=by)
        assert passed, line


def test_amd_code_gives_what_the_stand_in_gives(results):
    """Values, and how the scale lies in memory: the stand-in reads and writes as AMD does."""
    for _, line in results("stand-in", FUNCTIONS):
        assert line["count"] > 0
        assert line["problems"] == {}


def test_amd_code_drops_nan_as_the_adapters_say(results):
    """Why they are experimental: a row with a NaN comes out finite."""
    for _, line in results("nan", OPS[:3]):
        assert any("found" in text and "expected nan" in text for text in line["problems"].values())


def test_mistakes_on_amd_code_are_found(results):
    """A scale or a weight in another layout, another flavour of fp8, an inverse that is none."""
    for what, line in results("control", CONTROLS):
        assert line["problems"], what

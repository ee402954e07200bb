"""AMD's own aiter, imported without ROCm, its Triton kernels in the corrected interpreter.

    python real.py gfx942 FOLDER…

Each FOLDER is put in front of ``sys.path``; one holds aiter, unchanged.  The adapters call it, the
parity harness judges what comes back, and the stand-in gets the same calls.  Prints a line of JSON
per result: what was looked at, what was wrong, and how often it was looked at.

A process of its own: the stubs that make AMD's package importable are nobody else's business.
"""

from __future__ import annotations

import enum
import json
import os
import sys
import tempfile
import types
from collections import Counter
from pathlib import Path

import stand_in
import torch
import triton
from triton.backends.compiler import GPUTarget

import hwfuse
from hwfuse import _group_quant, _packages, _state, layouts, packing
from hwfuse.testing import parity, row
from hwfuse.testing.compare import compare
from hwfuse_rocm import _aiter

FLOATS = (torch.bfloat16, torch.float16)
SCALES = ("row", "column")
QUANT = row(m=(1, 17), k=384, scale_layout=SCALES, dtype=FLOATS)
MATRIX = {
    "rms_norm_fp8_group_quant": QUANT,
    "add_rms_norm_fp8_group_quant": QUANT,
    "flatten_fp8_group_quant": row(
        m=(1, 17), num_heads=3, is_heads_first=(False, True), scale_layout=SCALES
    ),
    "fp8_blockscale_gemm": row(
        m=(1, 37), n=80, k=384, is_preshuffled=(False, True), scale_layout=SCALES, dtype=FLOATS
    ),
    "fused_qkvbfg": row(m=(1, 17), hidden_size=64, num_heads=3, head_dim=64, dtype=FLOATS),
    "fused_qkvzba": row(m=(1, 17), num_k_heads=2, num_v_heads=4, head_k_dim=16, head_v_dim=32),
}
WITH_NAN = {  # in the third row
    "rms_norm_fp8_group_quant": row(m=3, k=256),
    "add_rms_norm_fp8_group_quant": row(m=3, k=256),
    "flatten_fp8_group_quant": row(m=3, num_heads=2),
}
# Between AMD's Triton code and the stand-in: sums in another order, and no more.
NEAR = {
    torch.float8_e4m3fn: ("fp8_codes", {"max_codes": 1, "share": 1e-3}),
    torch.float8_e4m3fnuz: ("fp8_codes", {"max_codes": 1, "share": 1e-3}),
    torch.float32: ("ulps", {"max_ulps": 8, "share": 1.0}),
    torch.bfloat16: ("rel_frobenius", {"bound": 2e-3}),
    torch.float16: ("rel_frobenius", {"bound": 2e-3}),
}
TRUNCATED = {torch.bfloat16: ("rel_frobenius", {"bound": 5e-3})}  # as the stand-in's preshuffled


def main(arch, *folders):
    """Import, run everything, print."""
    import_aiter(arch, folders)
    pretend_rocm()
    calls = recorded_calls()
    if version() == "0.1.7":  # whose preshuffled GEMM is C++ alone
        MATRIX["fp8_blockscale_gemm"].axes["is_preshuffled"] = (False,)
    with_rows(finite=True)
    for op, line in MATRIX.items():
        say(op, "contract", *judge(op, arch, {op: line}))
    for label, problems in compared(calls, stand_in.modules(version(), arch)).items():
        say(label, "stand-in", problems.pop("", 0), problems)
    with_rows(finite=False)
    for op, line in WITH_NAN.items():
        say(op, "nan", *judge(op, arch, {op: line}))
    with_rows(finite=True)
    for name, control in CONTROLS.items():
        if name != "preshuffled" or version() == "head":
            for what, result in control(arch):
                say(what, "control", *result)


def say(what, kind, count, problems):
    """Print one result."""
    line = {"what": what, "kind": kind, "count": count, "problems": problems}
    sys.stdout.write(json.dumps(line) + "\n")


def version():
    """Which of the two versions of the table this aiter is like: by what it has."""
    found = _packages.installed("aiter.ops.triton.quant.fused_fp8_quant")
    return "0.1.7" if found is None else "head"


def import_aiter(arch, folders):
    """Import aiter, given what it looks for: ROCm's tools, a driver, its enumerations."""
    home = Path(tempfile.mkdtemp())
    for name, text in {
        "bin/rocminfo": f"Name: {arch}\nDevice Type: GPU\nCompute Unit: 304",
        "bin/hipconfig": "7.0.2",
        ".info/version": "7.0.2",
    }.items():
        path = home / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\ncat <<'.'\n{text}\n.\n" if "bin" in name else text)
        path.chmod(0o755)
    os.environ |= {
        "ROCM_HOME": str(home), "ROCM_PATH": str(home), "HOME": str(home),
        "AITER_JIT_DIR": str(home / "jit"), "GPU_ARCHS": arch, "CU_NUM": "304",
        "PATH": f"{home / 'bin'}:{os.environ['PATH']}",
    }  # fmt: skip
    driver = types.SimpleNamespace(get_current_target=lambda: GPUTarget("hip", arch, 64))
    triton.runtime.driver.set_active(driver)
    activations = _enum("ActivationType", "No Silu Gelu Swiglu Situv2", -1)
    types_ = _enum("QuantType", "No per_Tensor per_Token per_1x32 per_1x128 per_128x128 x y")
    for name in ("enum", "core"):  # of 0.1.7 and of head
        module = types.ModuleType(f"module_aiter_{name}")
        module.__file__, module.aiter_tensor_t = "a stub", type("aiter_tensor_t", (), {})
        module.ActivationType, module.QuantType = activations, types_
        module.MlaVersion = _enum("MlaVersion", "V32 V40")
        module.MxScaleRoundMode = _enum("MxScaleRoundMode", "Floor Even")
        module.MxDtype = _enum("MxDtype", "FP4 FP8")
        sys.modules[module.__name__] = sys.modules[f"aiter.jit.{module.__name__}"] = module
    sys.path[:0] = folders
    import aiter  # noqa: A004 - the name of a Python builtin, and AMD's

    assert aiter.dtypes.fp8 == stand_in.FP8[arch]
    # Without ROCm the C++ modules cannot be built: let head take its Triton route.
    gemm = sys.modules["aiter.ops.gemm_op_a8w8"]
    if hasattr(gemm, "_BLOCKSCALE_HIP_PREBUILT_ARCHES"):
        gemm._BLOCKSCALE_HIP_PREBUILT_ARCHES = frozenset()


def _enum(name, members, start=0):
    found = enum.IntEnum(name, members.split(), start=start)
    found.__doc__ = "Members:"
    return found


def pretend_rocm():
    """Let selection find aiter, also from a checkout, and a ROCm."""
    before = _packages.installed
    _packages.installed = lambda name: before(name) or {"amd-aiter": "0", "rocm": "7.2"}.get(name)
    _packages.missing.cache_clear()
    _state.forget()


def recorded_calls():
    """Note each call of an adapter with copies of its tensors as they lie, and its result."""
    calls, find = [], _aiter.function

    def function(label):
        def call(*args, **kwargs):
            result = find(label)(*args, **kwargs)
            calls.append((label, args, kwargs, result))
            return result

        return call

    _aiter.function = function
    return calls


ADVERSARIAL = _group_quant.make_rows


def with_rows(*, finite):
    """Choose the rows of the group quantisations: ordinary ones, or the specs' own with NaN."""

    def rows(random, m, k, *, group_size, row_pad, dtype):
        exponents = random.integers(-6, 7, m, k // group_size, dtype=torch.float32)
        x = random.rows(m, k, row_pad=row_pad, dtype=dtype)
        return x.mul_(exponents.exp2().repeat_interleave(group_size, dim=1).to(dtype))

    _group_quant.make_rows = rows if finite else ADVERSARIAL


def judge(op, arch, matrix):
    """Let the parity harness check the adapter's values; count them and name the wrong ones."""
    count, problems = 0, {}
    for check in parity.checks([op], ["rocm"], f"rocm:{arch}", matrix):
        if check.implementation != "rocm/aiter" or check.label in ("reached", "rejections"):
            continue
        try:
            check.prove()
            count += 1
        except parity.NotTaken as reason:
            problems.setdefault(f"skipped: {reason}", check.name)
        except AssertionError as error:
            if "hipcc" in str(error) or "HIP" in str(error):
                problems.setdefault("skipped: not built here", check.name)
            else:
                problems[check.name] = str(error)
    return count, problems


def compared(calls, modules):
    """Give the stand-in the same calls; per function, how many agree and what does not."""
    found = {}
    for label, args, kwargs, result in calls:
        entry = _aiter.FUNCTIONS[label]
        of_label = found.setdefault(label, Counter())
        module = next(modules[name] for name in entry.modules if name in modules)
        near = NEAR | (TRUNCATED if "preshuffle" in label else {})
        for amd, ours in zip(
            flat(result), flat(getattr(module, entry.name)(*args, **kwargs)), strict=True
        ):
            problem = None
            if amd.stride() != ours.stride():
                problem = f"strides {amd.stride()}, {ours.stride()}"
            problem = problem or compare(near[amd.dtype], amd, ours, {})
            of_label[problem or ""] += 1
    return found


def flat(results):
    """Yield the tensors in nested tuples."""
    for item in results if isinstance(results, tuple) else (results,):
        if isinstance(item, tuple):
            yield from flat(item)
        elif item is not None:
            yield item


def forward_trick(arch):
    """A transposed scale is not restored by transposing once more."""
    right = layouts.from_aiter_legacy
    layouts.from_aiter_legacy = lambda s: layouts.convert(
        s.t().contiguous().view(s.shape), "column"
    )
    op = "rms_norm_fp8_group_quant"
    matrix = {op: row(m=5, k=384, scale_layout="column")}
    yield "forward trick as its own inverse", judge(op, arch, matrix)
    layouts.from_aiter_legacy = right


def wrong_flavour(arch):
    """The bytes of the other flavour of fp8."""
    fp8 = [stand_in.FP8[arch], *set(stand_in.FP8.values())]
    spec = hwfuse.op("fp8_blockscale_gemm").spec
    inputs = spec.make_inputs(m=37, n=80, k=384, fp8=next(t for t in fp8 if t != fp8[0]))
    wanted = hwfuse.op("fp8_blockscale_gemm").using("reference/torch")(**inputs)
    for name in ("a", "b"):
        inputs[name] = inputs[name].view(fp8[0])
    with hwfuse.testing.pretend(f"rocm:{arch}"):
        found = hwfuse.op("fp8_blockscale_gemm").using("rocm/aiter")(**inputs)
    problem = compare(spec.compare["out"], found, wanted, {})
    yield "wrong flavour of fp8", (1, {"out": problem} if problem else {})


def preshuffled(arch):
    """A row-major scale and an unshuffled weight, given to the preshuffled GEMM."""
    op = "fp8_blockscale_gemm"
    matrix = {op: row(m=37, n=80, k=384, is_preshuffled=True)}
    right = layouts.to_aiter_legacy
    layouts.to_aiter_legacy = lambda scale: layouts.convert(scale, "row")
    yield "row-major scale", judge(op, arch, matrix)
    layouts.to_aiter_legacy = right
    find = _aiter.function
    _aiter.function = lambda label: (
        lambda a, b, *rest, **more: find(label)(
            a, packing.unpreshuffle_16x16(b.view(5, 12, 2, 16, 16)), *rest, **more
        )
    )
    yield "unshuffled weight", judge(op, arch, matrix)
    _aiter.function = find


CONTROLS = {
    "forward": forward_trick,
    "flavour": wrong_flavour,
    "preshuffled": preshuffled,
}

if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # AMD's package leaves a traceback of torch.library behind at exit

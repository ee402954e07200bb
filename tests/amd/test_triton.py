"""Every Triton kernel of the AMD backend, compiled for AMD's arches; none needs to be here.

The implementations are found in the registry, so a new one is compiled and judged without being
named here.  That their numbers are right, interpreted, tests/test_parity.py proves.
"""

from __future__ import annotations

import functools
from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("numpy", reason="Triton's interpreter computes with numpy")

import triton
import triton.language as tl

import hwfuse
from hwfuse import _explain, _spec, _state
from hwfuse.testing import _matrix, _values, evidence, pretend
from hwfuse.testing._offline import compile_launch, recorded_launches

MOST = 1 << 23  # elements of the inputs; beyond, the layer is made smaller
SMALLER = {"num_experts": 2, "n": 512, "k": 1024}
ROWS = (1, 64, 512)
LDS = {"gfx942": 64 * 1024, "gfx950": 160 * 1024, "gfx1201": 64 * 1024, "gfx1250": 320 * 1024}
NEW = {"gfx1201", "gfx1250"}
TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
VECTOR = r"(buffer|global)_load_(lds_)?(dwordx4|b128)"
FP8 = {torch.float8_e4m3fn: "fp8e4nv", torch.float8_e4m3fnuz: "fp8e4b8"}
TO_FP8 = {"gfx942": "v_cvt_pk_fp8_f32"}  # on gfx1201 Triton converts in software
if TRITON >= (3, 7):
    TO_FP8 |= {"gfx950": "v_cvt_scalef32_pk_fp8_f32", "gfx1250": "v_cvt_scalef32_pk8_fp8_f32"}
DOT = {"gfx942": "v_mfma_.*", "gfx950": "v_mfma_.*", "gfx1201": "v_wmma_.*", "gfx1250": "v_wmma_.*"}
# What has no rows to load 16 bytes at a time, and why.
NARROW = {"w4a8_moe_prep": "a few expert ids, 4 bytes each"}
# Flavours between the kernels of one op: the w4a8 ops say e4m3fn on every device.
INSIDE = {"w4a8_moe": {"fp8e4nv"}}
OPS = [op for op in _spec.names() if "rocm/triton" in _state.registry().implementations(op)]


def of_arch(op, arch):
    """Skip an arch that the implementation itself leaves out."""
    declared = _state.registry().implementations(op)["rocm/triton"].requires.arch
    if declared and arch not in declared:
        pytest.skip(f"rocm/triton serves {op} on {', '.join(declared)}")


def arch_of(arch):
    """Parametrise with an arch that this Triton may not know."""
    lacking = "amd" not in triton.backends.backends or (arch == "gfx1250" and TRITON < (3, 7))
    mark = pytest.mark.skipif(lacking, reason=f"Triton {triton.__version__} does not know {arch}")
    return pytest.param(arch, marks=mark)


ARCHES = pytest.mark.parametrize("arch", [arch_of(arch) for arch in LDS])


def inputs(op, m):
    """Return a call with the sizes of a real model, or smaller ones where these are large."""
    spec = hwfuse.op(op).spec
    known = _matrix.defaults(spec)
    keywords = {"m": m}
    if (_matrix._num_elements(spec, keywords) or 0) > MOST:
        keywords |= {name: size for name, size in SMALLER.items() if name in known}
    return _explain.inputs(spec, **keywords)


def launches(op, arch):
    """Note what a call with few, some and many rows launches; each specialisation once."""
    found = {}
    spec = hwfuse.op(op).spec
    with pretend(f"rocm:{arch}"), hwfuse.using(**{op: "rocm/triton"}):
        for m in ROWS[:1] if arch in NEW else ROWS:
            args, kwargs = spec.split(inputs(op, m))
            with recorded_launches() as recorded:
                hwfuse.op(op)(*args, **kwargs)
            for one in recorded:
                types = tuple(a.dtype for a in one.args if isinstance(a, torch.Tensor))
                found[one.kernel, types, repr(sorted(one.kwargs.items()))] = one
    return list(found.values())


@functools.cache
def compiled(op, arch):
    """Compile them: [(launch, result)]."""
    found = launches(op, arch)
    assert found
    try:
        return [(one, compile_launch(one, arch)) for one in found]
    except RuntimeError as error:  # not of the kernel: that is a CompilationError
        if arch in NEW:
            pytest.skip(f"Triton {triton.__version__} fails on {op} for {arch}: {error}")
        raise


def flavours(op, arch):
    """Return the fp8 dtypes of the op's arguments and of its results, as Triton calls them."""
    spec = hwfuse.op(op).spec
    with pretend(f"rocm:{arch}"):
        arguments = _values.resolved(inputs(op, 2))
        outputs = () if spec.mutates else spec.outputs(**arguments)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    tensors = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    return [{FP8[t.dtype] for t in group if t.dtype in FP8} for group in (tensors, outputs)]


@contextmanager
def recorded_as(op, arch):
    """Note the outcome of this block as evidence; skip an arch that is left out."""
    of_arch(op, arch)
    try:
        yield
    except pytest.skip.Exception:
        raise
    except BaseException:
        evidence.record(op, "rocm/triton", arch, "compiled", passed=False)
        raise
    evidence.record(op, "rocm/triton", arch, "compiled", by=f"Triton {triton.__version__}")


@ARCHES
@pytest.mark.parametrize("op", OPS)
def test_kernels_fit_the_arch(op, arch):
    """No spilled register, no more LDS than there is (Triton does not say), matrix units used."""
    with recorded_as(op, arch):
        for one, result in compiled(op, arch):
            name = f"{one.kernel.__name__} {dict(one.kwargs)}"
            assert result.spills == 0, name
            assert result.shared <= LDS[arch], name
            assert ("tl.dot(" not in one.kernel.src) or result.count(DOT[arch]), name


@ARCHES
@pytest.mark.parametrize("op", OPS)
def test_kernels_use_the_fp8_of_the_arch(op, arch):
    """The flavour of the contract, by the arch's own instruction where that is the arch's own."""
    given, made = flavours(op, arch)
    with recorded_as(op, arch):
        count = 0
        for one, result in compiled(op, arch):
            kinds = {kind.lstrip("*") for kind in result.signature.values() if "fp8" in kind}
            assert kinds <= given | made | INSIDE.get(op, set()), one.kernel.__name__
            count += result.count(TO_FP8.get(arch, ""))
        if FP8[hwfuse.fp8_dtype(f"rocm:{arch}")] in made and arch in TO_FP8:
            assert count, f"no {TO_FP8[arch]}"


@ARCHES
@pytest.mark.parametrize("op", [op for op in OPS if op not in NARROW])
def test_kernels_load_16_bytes_at_a_time(op, arch):
    """Rows of a real model begin at multiples of 16 bytes; a kernel must see that."""
    with recorded_as(op, arch):
        assert sum(result.count(VECTOR) for _, result in compiled(op, arch))


@triton.jit
def convert_kernel(x_ptr, q_ptr, BLOCK: tl.constexpr):
    """Convert to whatever fp8 the pointer says."""
    i = tl.arange(0, BLOCK)
    tl.store(q_ptr + i, tl.load(x_ptr + i).to(q_ptr.dtype.element_ty))


@pytest.mark.parametrize(
    ("arch", "right", "wrong"),
    [
        pytest.param("gfx942", torch.float8_e4m3fnuz, torch.float8_e4m3fn),
        pytest.param("gfx950", torch.float8_e4m3fn, torch.float8_e4m3fnuz),
    ],
)
@pytest.mark.skipif(TRITON < (3, 7), reason="Triton 3.6 converts in software on gfx950")
def test_wrong_flavour_compiles_silently_and_the_instruction_shows_it(arch, right, wrong):
    """Why the instruction is asserted: there is no error, only software conversion."""
    counts = {}
    for dtype in (right, wrong):
        with recorded_launches() as recorded:
            convert_kernel[(1,)](torch.empty(1024), torch.empty(1024, dtype=dtype), BLOCK=1024)
        counts[dtype] = compile_launch(recorded[0], arch).count(TO_FP8[arch])
    assert counts[right] > 0
    assert counts[wrong] == 0


@pytest.mark.skipif("amd" not in triton.backends.backends, reason="this Triton has no AMD compiler")
def test_too_much_lds_compiles_silently():
    """Why LDS is asserted: Triton compiles what no device can launch."""
    with recorded_launches() as recorded:
        x, y = torch.empty(2, 256 * 256, dtype=torch.float16)
        product_kernel[(1,)](x, y, BLOCK=256, num_warps=8)
    assert compile_launch(recorded[0], "gfx942").shared > LDS["gfx942"]


@triton.jit
def product_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """Multiply two tiles that are too large."""
    i = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(y_ptr + i, tl.dot(tl.load(x_ptr + i), tl.load(y_ptr + i)))

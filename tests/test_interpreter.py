"""The corrected interpreter computes as the hardware does: a failing test per correction."""

import math
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("numpy", reason="Triton's interpreter computes with numpy")

import triton
import triton.language as tl

from hwfuse.testing._interpreter import CORRECTIONS, interpreted

LENGTH = 8192
BF16, F32 = torch.bfloat16, torch.float32


@triton.jit
def cast_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n)
    tl.store(y_ptr + i, x.to(y_ptr.dtype.element_ty), mask=i < n)


@triton.jit
def arithmetic_kernel(x_ptr, y_ptr, out_ptr, n, WHAT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + i, mask=i < n), tl.load(y_ptr + i, mask=i < n)
    out = x
    if WHAT == "add":
        out = x + y
    elif WHAT == "mul":
        out = x * y
    elif WHAT == "less":
        out = tl.where(x < y, x, y)
    elif WHAT == "fma":
        out = tl.fma(x, y, x)
    elif WHAT == "maximum":
        out = tl.maximum(x, y)
    elif WHAT == "minimum":
        out = tl.minimum(x, y)
    elif WHAT == "maximum_nan":
        out = tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)
    elif WHAT == "clamp":
        out = tl.clamp(x, -2.0, 2.0)
    tl.store(out_ptr + i, out, mask=i < n)


@triton.jit
def dot_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(c_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


@triton.jit
def row_maximum_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr, tl.max(tl.load(x_ptr + tl.arange(0, BLOCK)), axis=0))


@triton.jit
def double(x):
    return x + x


@triton.jit
def loop_kernel(x_ptr, out_ptr, n):
    tl.assume(n > 100)  # false below: a hint must not stop the kernel
    total = 0.0
    for i in range(n):
        total += double(tl.load(x_ptr + i))
    tl.store(out_ptr, total)


def floats(n=8009):
    """Values of all magnitudes that a fp8 or bfloat16 format rounds, saturates or flushes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, generator=generator) * torch.exp2(torch.randint(-20, 12, (n,)).float())
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, 448.0, 464.0, 465.0, 1e38, 2**-10, 3e-39]
    x[: len(special)] = torch.tensor(special)
    return x


def cast(x, dtype):
    """Cast with the kernel, in the corrected interpreter."""
    y = torch.empty(len(x), dtype=dtype)
    with interpreted():
        cast_kernel[(1,)](x, y, len(x), BLOCK=LENGTH)
    return y


def nearest(x, dtype):
    """Round to the nearest finite value, ties to the even code, by looking at all codes."""
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(dtype).double()
    positive = values.isfinite() & (values >= 0) & (codes < 128)
    codes, values = codes[positive], values[positive]
    last = len(values) - 1
    below = torch.searchsorted(values, x.double().abs(), right=True).sub(1).clamp(0, last)
    above = (below + 1).clamp(max=last)
    up, down = values[above] - x.double().abs(), x.double().abs() - values[below]
    chosen = torch.where((up < down) | ((up == down) & (codes[above] % 2 == 0)), above, below)
    rounded = torch.where(x.isnan(), math.nan, values[chosen] * torch.where(x < 0, -1.0, 1.0))
    return rounded.float()


def arithmetic(what, x, y):
    """Compute x WHAT y elementwise in the corrected interpreter."""
    out = torch.empty_like(x)
    with interpreted():
        arithmetic_kernel[(1,)](x, y, out, len(x), WHAT=what, BLOCK=LENGTH)
    return out


def test_cast_to_bfloat16_rounds_to_nearest_even():
    """A float32 becomes the bfloat16 that torch gives, on 8009 values."""
    x = floats()
    torch.testing.assert_close(cast(x, BF16), x.to(BF16), rtol=0, atol=0, equal_nan=True)


def test_cast_to_float16_rounds_to_nearest_even():
    """A float32 becomes the float16 that torch gives; too large a value becomes inf."""
    x = floats()
    expected = x.to(torch.float16)
    torch.testing.assert_close(cast(x, torch.float16), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("source", [F32, BF16, torch.float16])
@pytest.mark.parametrize("name", ["e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz"])
def test_cast_to_fp8_takes_the_nearest_code_and_saturates(name, source):
    """Every value gets the nearest code, ties to even, the largest one beyond the range."""
    dtype, x = getattr(torch, f"float8_{name}"), floats().to(source)
    expected = nearest(x.float(), dtype)
    torch.testing.assert_close(cast(x, dtype).float(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e4m3fnuz])
def test_cast_from_fp8_is_exact(dtype):
    """All 256 codes keep their value."""
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    torch.testing.assert_close(cast(codes, F32), codes.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("source", "target"), [(torch.int32, BF16), (BF16, torch.int32)])
def test_cast_between_integers_and_bfloat16_keeps_the_value(source, target):
    """Numbers are converted, not bit patterns."""
    x = torch.arange(-256, 257).to(source)
    assert torch.equal(cast(x, target), x.to(target))


@pytest.mark.parametrize("what", ["add", "mul", "less", "fma", "maximum", "clamp"])
def test_bfloat16_arithmetic_uses_values(what):
    """What is computed with bfloat16 equals torch's."""
    x, y = floats()[16:].to(BF16), floats()[16:].to(BF16).flip(0)
    expected = {
        "add": x + y,
        "mul": x * y,
        "less": torch.where(x < y, x, y),
        "fma": (x.double() * y.double() + x.double()).to(BF16),
        "maximum": torch.maximum(x, y),
        "clamp": x.clamp(-2, 2),
    }[what]
    assert torch.equal(arithmetic(what, x, y), expected)


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float8_e4m3fnuz])
def test_dot_multiplies_values(dtype):
    """A dot of small integers is exact in every input type."""
    a, b = torch.randint(-4, 5, (2, 32, 32), generator=torch.Generator().manual_seed(0))
    c = torch.empty(32, 32)
    with interpreted():
        dot_kernel[(1,)](a.to(F32).to(dtype), b.to(F32).to(dtype), c, N=32)
    assert torch.equal(c, (a @ b).float())


@pytest.mark.parametrize(
    ("what", "expected"),
    [("maximum", 1.0), ("minimum", 1.0), ("clamp", -2.0), ("maximum_nan", None)],
)
def test_nan_is_dropped_unless_propagation_is_asked_for(what, expected):
    """As max.f32 does: the other operand wins over a NaN."""
    found = arithmetic(what, torch.full((4,), math.nan), torch.ones(4))
    assert found.isnan().all() if expected is None else (found == expected).all()


def test_row_maximum_when_all_are_nan_gives_nan_without_a_warning():
    """Warnings are errors in this suite, and a kernel has nobody to warn."""
    x, out = torch.full((8,), math.nan), torch.zeros(1)
    with interpreted():
        row_maximum_kernel[(1,)](x, out, BLOCK=8)
    assert out.isnan()


def test_fma_rounds_once():
    """x*y + x keeps the product's low half, which two roundings would lose."""
    x = torch.full((4,), 1 + 2**-12)
    y = -x
    exact = (x.double() * y.double() + x.double()).float()
    assert not torch.equal(exact, x * y + x)
    assert torch.equal(arithmetic("fma", x, y), exact)


def test_loop_with_helper_and_false_hint_runs():
    """A scalar bounds a loop with every numpy, device functions work, tl.assume asserts nothing."""
    x, out = torch.arange(8.0), torch.zeros(1)
    with interpreted():
        loop_kernel[(1,)](x, out, 8)
    assert out.item() == 56.0


def test_nested_blocks_restore_at_the_outermost_exit():
    """Blocks may be nested; after the last one Triton is what it was, bit for bit."""
    before = snapshot()
    with interpreted():
        with interpreted():
            pass
        inside = snapshot()
        assert cast(torch.ones(1), BF16).item() == 1.0
    assert snapshot() == before
    assert {name for name in before if before[name] != inside[name]}


def test_exception_in_a_kernel_when_raised_restores_triton():
    """A failing launch or block leaves no patch behind."""
    before = snapshot()
    with pytest.raises(triton.runtime.errors.InterpreterError), interpreted():
        loop_kernel[(1,)](torch.ones(1), None, 1)
    assert snapshot() == before


def snapshot():
    """Everything of Triton and of this module that an interpreted launch could change."""
    from triton.runtime import interpreter
    from triton.runtime.jit import JITFunction

    owners = [tl, tl.core, tl.math, tl.standard, tl.tensor, tl.dtype, JITFunction, interpreter]
    owners += [v for v in vars(interpreter).values() if isinstance(v, type)]
    state = {(str(o), name): id(value) for o in owners for name, value in vars(o).items()}
    return state | {("test", name): 0 for name in globals()}


def test_compilation_works_before_inside_and_after():
    """The same process compiles the kernels that it interprets."""
    from triton.backends.compiler import GPUTarget

    def ptx():
        types = {"x_ptr": "*fp32", "out_ptr": "*fp32", "BLOCK": "constexpr"}
        source = triton.compiler.ASTSource(row_maximum_kernel, types, {"BLOCK": 8})
        return triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]

    before = ptx()
    with interpreted():
        test_row_maximum_when_all_are_nan_gives_nan_without_a_warning()
        assert ptx() == before
    assert ptx() == before


def test_corrections_are_listed_in_words():
    """The harness prints what it relies on."""
    assert all(isinstance(text, str) and text for text in CORRECTIONS)


def test_import_of_the_module_leaves_triton_alone():
    """hwfuse.testing costs no Triton until a block is entered."""
    code = "import sys, hwfuse.testing._interpreter; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

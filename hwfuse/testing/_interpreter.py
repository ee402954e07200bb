"""Run Triton kernels on CPU tensors, with the arithmetic that the hardware has.

Triton's interpreter is meant for debugging: it truncates where hardware rounds, and it computes
with the bit patterns of bfloat16.  A test that passes in it proves nothing about rounding.
`interpreted` corrects what `CORRECTIONS` lists for as long as it is entered, and it interprets
kernels that were defined without ``TRITON_INTERPRET``, so that one process can also compile them.

Triton is imported when `interpreted` is entered, not before.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

CORRECTIONS = (
    "casts to bfloat16, float16 and fp8 round to nearest, ties to even; fp8 saturates",
    "the fp8 types of gfx942 (fp8e4b8, fp8e5b16) are known",
    "bfloat16 arithmetic, comparisons, dot and casts from and to integers use values, not bits",
    "tl.maximum, tl.minimum and tl.clamp drop a NaN unless told to propagate it",
    "tl.fma rounds once",
    "tl.assume is a hint, not an assertion",
    "a scalar tensor is a loop bound with every numpy",
)

_TORCH_TYPES = {
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e4b8": torch.float8_e4m3fnuz,
    "fp8e5": torch.float8_e5m2,
    "fp8e5b16": torch.float8_e5m2fnuz,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}

# Kernels as the interpreter rewrote them, which takes longer than a small launch.  By function: who
# replaces a helper of a kernel in its module has to define the kernel anew.
_rewritten: dict[Any, Any] = {}

_lock = threading.RLock()
_depth = 0
_active = contextlib.ExitStack()


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Interpret every ``kernel[grid](...)`` whose tensors are all on the CPU.

    Nesting is allowed; the outermost exit restores Triton.  The change is one of the process, not
    of the thread: do not compile kernels in another thread meanwhile.
    """
    global _active, _depth  # noqa: PLW0603
    with _lock:
        if _depth == 0:
            _active = _corrected()
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                _active.close()


def _corrected() -> contextlib.ExitStack:
    """Apply all corrections; closing the result takes them back."""
    from triton.runtime import interpreter
    from triton.runtime.jit import JITFunction

    changes = [
        (JITFunction, _launching(interpreter, JITFunction)),
        (interpreter, _conversion(interpreter) | _language(interpreter)),
        (interpreter.InterpreterBuilder, _bfloat16(interpreter) | _nan_and_fma(interpreter)),
        (interpreter.ReduceOps, _reductions(interpreter)),
        (interpreter.FunctionRewriter, {"_compile_and_exec": _rewriting(interpreter)}),
        (interpreter.InterpretedFunction, {"rewritten_fn": _rewritten}),
    ]
    with contextlib.ExitStack() as stack:
        for owner, attributes in changes:
            for name, value in attributes.items():
                stack.enter_context(mock.patch.object(owner, name, value))
        return stack.pop_all()


def _on_cpu(values: Any) -> bool:
    tensors = (getattr(value, "base", value) for value in values)  # descriptors have a base
    return all(t.device.type == "cpu" for t in tensors if isinstance(t, torch.Tensor))


def _launching(interpreter: Any, jit_function: Any) -> dict[str, Any]:
    """Interpret launches on CPU tensors, and the device functions that a kernel calls."""
    upstream = jit_function.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if not _on_cpu((*args, *kwargs.values())):
            return upstream(self, *args, grid=grid, warmup=warmup, **kwargs)
        function = interpreter.InterpretedFunction(self.fn)
        with interpreter.np.errstate(all="ignore"):  # no accelerator warns of an overflow
            return function.run(*args, grid=grid, warmup=warmup, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        known = interpreter.InterpretedFunction.rewritten_fn
        function = known.get(self.fn) or interpreter.InterpretedFunction(self.fn).rewrite()
        return function(*args, **kwargs)

    return {"run": run, "__call__": call}


def _rewriting(interpreter: Any) -> Any:
    """Upstream adds its own globals to the kernel's module for good; here they get a copy."""

    def compile_and_exec(self: Any, tree: Any) -> Any:
        names = {**vars(interpreter), **self.fn.__globals__}
        exec(compile(tree, self.filename, "exec"), names)  # noqa: S102
        return names[self.fn.__name__]

    return compile_and_exec


def _language(interpreter: Any) -> dict[str, Any]:
    """Patch the whole language once per launch, whichever part a kernel or its helpers import."""
    tl = interpreter.tl
    upstream = interpreter._patch_lang  # noqa: SLF001
    both = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    def patch_lang(_: Any) -> Any:
        scope = upstream(both)
        to_ir = tl.dtype.to_ir

        def to_ir_with_fnuz(self: Any, builder: Any) -> Any:
            if self.name in ("fp8e4b8", "fp8e5b16"):
                return self
            return to_ir(self, builder)

        scope.set_attr(tl.dtype, "to_ir", to_ir_with_fnuz)
        scope.set_attr(tl.tensor, "__index__", lambda self: self.handle.data.item())
        return scope

    return {"_patch_lang": patch_lang}


def _conversion(interpreter: Any) -> dict[str, Any]:
    """Convert between float types as PyTorch does, fp8 saturating; other cases are upstream's."""
    np = interpreter.np
    nearest = interpreter._ir.ROUNDING_MODE.RTNE  # noqa: SLF001
    upstream = interpreter._convert_float  # noqa: SLF001

    def convert_float(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        known = source.name in _TORCH_TYPES and target.name in _TORCH_TYPES
        if not known or rounding not in (None, nearest):
            return upstream(data, source, target, rounding)
        source_type, target_type = _TORCH_TYPES[source.name], _TORCH_TYPES[target.name]
        raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        values = torch.from_numpy(raw.copy()).view(source_type)
        values = values.to(torch.float64 if source.name == "fp64" else torch.float32)
        if target.name.startswith("fp8"):
            limit = torch.finfo(target_type).max
            values = values.clamp(-limit, limit)  # keeps NaN
        bits = values.to(target_type).view(torch.uint8).numpy()
        return bits.view(f"u{target_type.itemsize}").reshape(data.shape)

    return {"_convert_float": convert_float}


class _BFloat16:
    """Turns handles of bfloat16, which the interpreter keeps as bit patterns, into values."""

    def __init__(self, interpreter: Any) -> None:
        self.interpreter = interpreter
        self.type, self.fp32 = interpreter.tl.bfloat16, interpreter.tl.float32

    def holds(self, operand: Any) -> bool:
        return bool(operand.dtype.scalar == self.type)

    def widen(self, operand: Any) -> Any:
        if not self.holds(operand):
            return operand
        bits = self.interpreter._convert_float(operand.data, self.type, self.fp32, None)  # noqa: SLF001
        return self.interpreter.TensorHandle(bits.view("f4"), self.fp32)

    def narrow(self, data: Any) -> Any:
        data = data.astype("f4")
        bits = self.interpreter._convert_float(data, self.fp32, self.type, None)  # noqa: SLF001
        return self.interpreter.TensorHandle(bits, self.type)


def _bfloat16(interpreter: Any) -> dict[str, Any]:
    """Let every operation see bfloat16 as float32, and round what it gives back."""
    np, bf16 = interpreter.np, _BFloat16(interpreter)
    builder = interpreter.InterpreterBuilder
    upstream_cast, upstream_dot = builder.cast_impl, builder.create_dot

    def by_value(upstream: Any) -> Any:
        def operation(self: Any, *arguments: Any) -> Any:
            *operands, function = arguments
            if not bf16.holds(operands[-1]) or function is np.where:  # a selection moves bits
                return upstream(self, *operands, function)
            data = upstream(self, *map(bf16.widen, operands), function).data
            if data.dtype == np.bool_:
                return interpreter.TensorHandle(data, bf16.type)  # upstream's way with comparisons
            return bf16.narrow(data)

        return operation

    def cast(self: Any, source: Any, target_type: Any) -> Any:
        source_scalar, target = source.dtype.scalar, target_type.scalar
        if source_scalar.is_floating() and target.is_floating():
            return self.create_fp_to_fp(source, target_type, None)
        if target == bf16.type:
            return bf16.narrow(source.data)
        return upstream_cast(self, bf16.widen(source), target_type)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return upstream_dot(self, bf16.widen(a), bf16.widen(b), *rest)

    return {
        "binary_op": by_value(builder.binary_op),
        "ternary_op": by_value(builder.ternary_op),
        "cast_impl": cast,
        "create_dot": dot,
    }


def _nan_and_fma(interpreter: Any) -> dict[str, Any]:
    """Drop NaN in minimum, maximum and clamp; round a fused product once; believe every hint."""
    np, tl = interpreter.np, interpreter.tl

    def clamp(self: Any, x: Any, low: Any, high: Any, propagate_nan: Any) -> Any:
        def without_nan(x: Any, low: Any, high: Any) -> Any:
            return np.fmin(np.fmax(x, low), high)

        keeps = propagate_nan == tl.PropagateNan.ALL
        return self.ternary_op(x, low, high, np.clip if keeps else without_nan)

    def fused(x: Any, y: Any, z: Any) -> Any:
        exact = x.astype(np.float64) * y.astype(np.float64)
        return (exact + z).astype(z.dtype)

    return {
        "create_clampf": clamp,
        "create_maxnumf": lambda self, x, y: self.binary_op(x, y, np.fmax),
        "create_minnumf": lambda self, x, y: self.binary_op(x, y, np.fmin),
        "create_fma": lambda self, x, y, z: self.ternary_op(x, y, z, fused),
        "create_assume": lambda _self, _condition: None,
    }


def _reductions(interpreter: Any) -> dict[str, Any]:
    """Reduce a row of NaN without a warning."""
    np = interpreter.np
    upstream = interpreter.ReduceOps.min_max
    quiet = {np.nanmax: np.fmax.reduce, np.nanmin: np.fmin.reduce}

    def min_max(self: Any, values: Any, val_reduce_op: Any, idx_reduce_op: Any = None) -> Any:
        return upstream(self, values, quiet.get(val_reduce_op, val_reduce_op), idx_reduce_op)

    return {"min_max": min_max}

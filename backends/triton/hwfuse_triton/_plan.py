"""Plans: repeated launches that leave out what Triton does to find the binary.

Triton compiles a binary for the types of the arguments and for some of their values: an integer
that is 1 or a multiple of 16, a pointer that is a multiple of 16.  A plan keeps one binary, and is
made only if the compiled object itself shows that it assumes nothing but the types and aligned
pointers.  The function that is generated from it checks just that on every call, and otherwise
leaves the launch to ``kernel[grid](...)``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hwfuse_triton import _private, _record

_NAMES = ("run", "function", "packed_metadata")  # of a compiled kernel
_SCRATCH = ("global", "profile")
_RANGE = "tt.pointer_range"  # AMD: offsets fit 32 bits because the storage is below 2 GiB


@dataclass(frozen=True)
class Plan:
    """A binary, and what its arguments have to be.

    *kinds* has one letter per argument: P a pointer, i a 32-bit integer, f a float.  *near* are the
    positions of pointers to storage that has to be smaller than 2 GiB.  *constants*: how many the
    kernel has.
    """

    compiled: Any
    kinds: str
    dtypes: tuple[torch.dtype, ...]
    near: tuple[int, ...]
    device: int
    launch: Callable[[int, tuple[Any, ...]], bool]
    constants: int = 0

    def binary(self) -> _record.Kernel | str:
        """Return the binary as NVIDIA's driver launches it, or why only Triton can."""
        metadata = self.compiled.metadata
        try:
            if metadata.num_ctas != 1 or metadata.launch_cooperative_grid:
                return "it is a cooperative kernel or one of clusters"
            return _record.Kernel(
                function=self.compiled.function,
                block=metadata.num_warps * 32,
                shared=metadata.shared,
                kinds=self.kinds,
                pdl=bool(getattr(metadata, "launch_pdl", False)),
                scratch=len(_SCRATCH),
                keep=self,
            )
        except AttributeError as error:
            return f"this Triton's objects are unknown: {error}"


def breach(kernel: Any, compiled: Any, kinds: str) -> str | None:
    """Say what *compiled* assumes besides types and pointers that are multiples of 16."""
    try:
        signature, attributes = list(compiled.src.signature.items()), compiled.src.attrs
        metadata = compiled.metadata
        kinds_of_scratch = ("profile",) if metadata.target.backend == "hip" else _SCRATCH
        scratch = sum(getattr(metadata, f"{name}_scratch_size") for name in kinds_of_scratch)
        changeable = [name for (name, _), (value, _) in kernel.used_global_vals.items()
                      if type(value).__name__ != "constexpr"]  # fmt: skip
    except AttributeError as error:
        return f"this Triton's objects are unknown: {error}"
    runtime = [p for p in kernel.params if not p.is_constexpr]
    if len(runtime) != len(kinds) or any(p.is_constexpr for p in kernel.params[: len(kinds)]):
        return "its constants do not follow its other arguments"
    for index, (parameter, kind) in enumerate(zip(runtime, kinds, strict=True)):
        name, found = signature[index]
        hints = {hint[0]: hint[1] for hint in attributes.get((index,), ())}
        if text := _breach(parameter, kind, found, hints):
            return f"{name} {text}"
    if scratch:
        return f"it needs {scratch} bytes of scratch memory"
    if changeable:
        return f"it reads {', '.join(changeable)}, which could change"
    return None


def _breach(parameter: Any, kind: str, found: str, hints: dict[str, int]) -> str | None:
    """Say what is assumed of one argument: its type is *found*, its value has *hints*."""
    if kind == "P":
        if not found.startswith("*"):
            return f"is compiled as {found}, not as a pointer"
        if hints.pop("tt.divisibility", None) != 16:
            return "may be at any address: slower than need be"
        hints.pop(_RANGE, None)
    elif found != {"i": "i32", "f": "fp32"}.get(kind):
        return f"is compiled as {found}"
    elif not parameter.do_not_specialize:
        return "is not in do_not_specialize"
    return f"is assumed to have {', '.join(sorted(hints))}" if hints else None


def make(kernel: Any, compiled: Any, arguments: Sequence[Any], device: int) -> Plan | str:
    """Return a plan for launches like the one that gave *compiled*, or why there is none."""
    kinds = "".join("P" if isinstance(a, Tensor) else "f" if type(a) is float else "i"
                    for a in arguments)  # fmt: skip
    if "P" not in kinds:
        return "it has no tensor"
    if text := breach(kernel, compiled, kinds):
        return text
    hooks, stream = _private.hooks(), _private.raw_stream
    if hooks is None or stream is None:
        return f"private names are gone: {', '.join(_private.missing())}"
    lacking = [name for name in _NAMES if getattr(compiled, name, None) is None]
    if lacking:
        return f"a compiled kernel has no {', '.join(lacking)}"
    near = tuple(i for (i, *_), hints in compiled.src.attrs.items() if _RANGE in dict(hints))
    dtypes = tuple(a.dtype for a in arguments if isinstance(a, Tensor))
    constants = len(kernel.params) - len(kinds)
    launch = _function(kinds, near, constants)(
        dtypes, device, compiled.run, compiled.function, compiled.packed_metadata, stream,
        _private.current_device, hooks, getattr(kernel, "pre_run_hooks", ()),
    )  # fmt: skip
    return Plan(compiled, kinds, dtypes, near, device, launch, constants)


@functools.cache
def _function(kinds: str, near: tuple[int, ...], constants: int) -> Callable[..., Any]:
    """Generate the launching function of all kernels with these kinds of arguments: no loops."""
    names = [f"a{i}" for i in range(len(kinds))]
    pointers = [i for i, kind in enumerate(kinds) if kind == "P"]
    types = [f"D{place}" for place in range(len(pointers))]
    wrong = [f"a{i}.dtype is not {type_}" for i, type_ in zip(pointers, types, strict=True)]
    wrong += [f"a{i}.get_device() != device" for i in pointers]
    wrong += [f"a{i}.untyped_storage().nbytes() > 0x7FFFFFFF" for i in near]
    for i, kind in enumerate(kinds):
        if kind == "i":
            wrong.append(f"type(a{i}) is not int or not 0 <= a{i} <= 0x7FFFFFFF")
        elif kind == "f":
            wrong.append(f"type(a{i}) is not float")
    fetch = "; ".join(f"p{i} = a{i}.data_ptr()" for i in pointers) or "pass"
    some = " and ".join(f"p{i}" for i in pointers) or "True"
    bits = " | ".join(f"p{i}" for i in pointers) or "0"
    values = [f"p{i}" if kind == "P" else f"a{i}" for i, kind in enumerate(kinds)]
    values += ["None"] * constants  # the number of arguments is always the compiled one
    source = f"""
def make(dtypes, device, run, function, packed, stream, current, hooks, before):
    {"".join(f"{name}, " for name in types)} = dtypes
    knobs, enter, leave = hooks.knobs, hooks.enter, hooks.exit
    def launch(programs, arguments):
        {"".join(f"{name}, " for name in names)} = arguments
        try:
            if (
                {" or ".join(wrong)}
                or not 0 < programs <= 0x7FFFFFFF
                or current() != device
                or knobs.launch_enter_hook is not enter or enter.calls
                or knobs.launch_exit_hook is not leave or leave.calls or before
            ):
                return False
            {fetch}
        except Exception:  # no tensor, or one without memory: the ordinary launch names it
            return False
        if ({bits}) & 15 or not ({some}):
            return False
        run(programs, 1, 1, stream(device), function, packed, None, None, None, {", ".join(values)})
        return True
    return launch
"""
    scope: dict[str, Any] = {}
    exec(compile(source, f"<launch of {kinds}>", "exec"), scope)  # noqa: S102
    made: Callable[..., Any] = scope["make"]
    return made

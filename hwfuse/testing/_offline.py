"""Compile Triton kernels for accelerators that are not here, and say what came out.

What is compiled is what a real launch would compile: `recorded_launches` notes the launches of
ordinary calls on CPU tensors, and `compile_launch` specialises each as Triton itself does.

Triton is imported when something is recorded or compiled, not before.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

# Bytes of shared memory (LDS) that one program may use.  Triton checks them only at launch.
SHARED_LIMIT = {
    "sm80": 163 * 1024,
    "sm90": 227 * 1024,
    "sm100": 227 * 1024,
    "gfx942": 64 * 1024,
    "gfx950": 160 * 1024,
}


@dataclass(frozen=True)
class Launch:
    """One ``kernel[grid](*args, **kwargs)`` that was recorded instead of run."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for an arch.

    `asm` is SASS or amdgcn; `spills` counts bytes of local memory (NVIDIA) or spilled registers
    (AMD); `signature` has the type of each parameter and `hints` what Triton assumed of its value.
    """

    arch: str
    asm: str
    registers: int
    spills: int
    shared: int
    scratch: int
    instructions: Counter[str]
    signature: Mapping[str, str]
    hints: Mapping[str, Mapping[str, int]]

    def count(self, pattern: str) -> int:
        """Return how many instructions match the regular expression *pattern* as a whole."""
        return sum(n for name, n in self.instructions.items() if re.fullmatch(pattern, name))


@contextlib.contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Note launches in the list that is returned; nothing runs, outputs stay as allocated."""
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []

    def run(self: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        del warmup
        launches.append(Launch(self, grid, args, kwargs))

    with mock.patch.object(JITFunction, "run", run):
        yield launches


def compile_launch(launch: Launch, arch: str, **changes: Any) -> Compiled:
    """Compile what *launch*, with other keyword arguments where *changes* has them, would compile.

    Args:
        launch: From `recorded_launches`.
        arch: ``"sm80"`` … ``"sm100"``, ``"gfx942"``, ``"gfx950"`` or any other that Triton knows.
        **changes: Constexpr parameters, or options such as ``num_warps``.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    if arch.startswith("sm"):
        target = GPUTarget("cuda", int(arch[2:]), 32)
    else:
        target = GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    kernel, kwargs = launch.kernel, {**launch.kwargs, **changes}
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, kinds, _ = bind(*launch.args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(  # noqa: SLF001
        backend, kwargs, bound, kinds, None
    )
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=target, options=options.__dict__)
    names = list(signature)
    metadata = compiled.metadata
    return Compiled(
        arch=arch,
        shared=metadata.shared,
        scratch=sum(getattr(metadata, f"{kind}_scratch_size", 0) for kind in ("global", "profile")),
        signature=signature,
        hints={names[path[0]]: dict(hints) for path, hints in attributes.items() if hints},
        **(_nvidia if target.backend == "cuda" else _amd)(compiled.asm),
    )


def contract_breaches(launch: Launch, compiled: Compiled) -> list[str]:
    """Say what *compiled* assumes of its arguments besides their types and 16-byte pointers.

    A kernel without breaches may be launched again with other sizes, strides and tensors without
    asking Triton, as long as the pointers are multiples of 16.  On AMD there is one more
    assumption, the hint ``tt.pointer_range``: the tensor's storage is smaller than 2 GiB.
    """
    breaches = []
    for parameter in launch.kernel.params:
        name = parameter.name
        kind, hints = compiled.signature[name], set(compiled.hints.get(name, ()))
        if parameter.is_constexpr:
            continue
        if kind.startswith("*"):
            if "tt.divisibility" not in hints:
                breaches.append(f"{name}: compiled for a pointer that is no multiple of 16")
            hints -= {"tt.divisibility", "tt.pointer_range"}
        elif kind not in ("i32", "fp32"):
            breaches.append(f"{name}: compiled as {kind}, needed i32 or fp32")
        elif not parameter.do_not_specialize:
            breaches.append(f"{name}: not in do_not_specialize")
        breaches += [f"{name}: {hint} is assumed of its value" for hint in sorted(hints)]
    if compiled.scratch:
        breaches.append(f"needs {compiled.scratch} bytes of scratch memory")
    return breaches


def _nvidia(asm: Mapping[str, Any]) -> dict[str, Any]:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = _output(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        sass = _output(knobs.nvidia.nvdisasm.path, "-c", file.name)
    amounts = {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", usage)}
    opcodes = re.findall(
        r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE
    )
    return {
        "asm": sass,
        "registers": amounts["REG"],
        "spills": amounts["STACK"] + amounts["LOCAL"],
        "instructions": Counter(opcodes),
    }


def _amd(asm: Mapping[str, Any]) -> dict[str, Any]:
    text = asm["amdgcn"]

    def amount(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s*(\d+)", text)[0])

    return {
        "asm": text,
        "registers": amount("vgpr_count"),
        "spills": amount("vgpr_spill_count") + amount("sgpr_spill_count"),
        "instructions": Counter(re.findall(r"^\s+([a-z]\w+)", text, re.MULTILINE)),
    }


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout

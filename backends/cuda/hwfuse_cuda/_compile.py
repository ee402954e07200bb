"""From CUDA C++ to a cubin: nvcc or NVRTC, and the cache on disk.

Device code only, so both compilers give the same kind of file.  Sources stand in the folder ``cpp``
and include nothing but its own ``.cuh`` files: no toolkit headers are needed.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import re
import shlex
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from hwfuse import HwfuseError
from hwfuse._compilers import INSTALL, Compiler, cache_folder, compilers

SOURCES = Path(__file__).parent / "cpp"
OPTIONS = ("-std=c++17", "-lineinfo")
_DIGEST = 32  # bytes of the checksum that a cached file begins with
_OUTPUT = 3000  # characters of a compiler's output that an error quotes


class CompileError(HwfuseError):
    """CUDA C++ that no compiler here accepts, or no compiler at all."""


def cubin(source: str, arch: str, defines: Mapping[str, str | int] | None = None) -> bytes:
    """Return the machine code of a file in ``cpp``, from the cache or compiled now.

    Args:
        source: File name, as ``"w4a8_moe_prep.cu"``.
        arch: ``"sm90"``, or ``"sm90a"`` for what only that arch has.
        defines: Macros by name.

    Raises:
        CompileError: No compiler is here, or none accepts the source; with its output and the
            command that repeats it.
    """
    found = compilers()
    if not found:
        raise CompileError(f"{source}: neither nvcc nor NVRTC was found: {INSTALL}")
    text = expand(source)
    macros = tuple(f"-D{name}={value}" for name, value in (defines or {}).items())
    names = [_file_name(source, text, arch, macros, compiler) for compiler in found]
    folder = cache_folder()
    for name in names:
        if (code := read_cached(folder / name)) is not None:
            return code
    with _alone(folder / f"{names[0]}.lock"):
        if (code := read_cached(folder / names[0])) is not None:
            return code  # another process compiled it while this one waited
        index, code = _compile(source, text, arch, macros, found)
        _write_cached(folder / names[index], code)
    return code


def expand(source: str) -> str:
    """Return a file of ``cpp`` with its own includes in place: all that the compiler will read."""
    text = (SOURCES / source).read_text(encoding="utf-8")

    def included(match: re.Match[str]) -> str:
        line = text.count("\n", 0, match.start()) + 2
        return f'{expand(match[1])}\n#line {line} "{source}"'

    body = re.sub(r'^#include "([\w.]+)"', included, text, flags=re.MULTILINE)
    return f'#line 1 "{source}"\n{body}'


def read_cached(path: Path) -> bytes | None:
    """Return the code in a cached file; None if it is absent, or broken."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, code = data[:_DIGEST], data[_DIGEST:]
    return code if hashlib.sha256(code).digest() == digest else None


def _write_cached(path: Path, code: bytes) -> None:
    """Write a file that is whole or absent; a folder that cannot be written to is no error."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(hashlib.sha256(code).digest() + code)
        Path(file.name).replace(path)


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Let one process at a time compile; where there are no locks, each compiles for itself."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(lock.open("w"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _file_name(
    source: str, text: str, arch: str, macros: tuple[str, ...], compiler: Compiler
) -> str:
    key = "\0".join((text, arch, *macros, *OPTIONS, compiler.kind, compiler.version))
    return f"{Path(source).stem}-{arch}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.cubin"


def _compile(
    source: str, text: str, arch: str, macros: tuple[str, ...], found: tuple[Compiler, ...]
) -> tuple[int, bytes]:
    """Return the first code that a compiler makes, and which one's it is.

    The second one is asked too: the first may be too old for the arch, or lack its host compiler.
    """
    refusals = []
    options = [f"-arch={arch.replace('sm', 'sm_')}", *OPTIONS, *macros]
    for index, compiler in enumerate(found):
        try:
            if compiler.kind == "nvcc":
                return index, _nvcc(compiler.path, text, options)
            return index, _nvrtc(compiler.path, source, text, options)
        except CompileError as error:
            refusals.append(f"{compiler}:\n{error}")
    repeat = shlex.join(["nvcc", "-cubin", *options, str(SOURCES / source)])
    raise CompileError(
        f"{source} does not compile for {arch}.\n" + "\n".join(refusals) + f"\nTo repeat: {repeat}"
    )


def _nvcc(path: str, text: str, options: list[str]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        program, result = Path(folder, "kernel.cu"), Path(folder, "kernel.cubin")
        program.write_text(text, encoding="utf-8")
        command = [path, "-cubin", *options, "-o", str(result), str(program)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not result.is_file():
            raise CompileError(_shortened(done.stderr + done.stdout))
        return result.read_bytes()


def _nvrtc(path: str, source: str, text: str, options: list[str]) -> bytes:
    for builtins in Path(path).parent.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(builtins))  # NVRTC asks for it by name, and pip's folder is on no path
    library = ctypes.CDLL(path)
    program = ctypes.c_void_p()
    created = library.nvrtcCreateProgram(
        ctypes.byref(program), text.encode(), source.encode(), 0, None, None
    )
    if created:
        raise CompileError(f"nvrtcCreateProgram failed with {created}")
    options = [*options, "-default-device"]  # a generic lambda cannot say so itself
    try:
        array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        failed = library.nvrtcCompileProgram(program, len(options), array)
        if failed:
            raise CompileError(_shortened(_text(library, "ProgramLog", program).decode()))
        return _text(library, "CUBIN", program)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _text(library: ctypes.CDLL, what: str, program: ctypes.c_void_p) -> bytes:
    """Return what ``nvrtcGet…`` and ``nvrtcGet…Size`` answer."""
    size = ctypes.c_size_t()
    getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(library, f"nvrtcGet{what}")(program, buffer)
    return buffer.raw


def _shortened(output: str) -> str:
    """Return the lines that name errors, or the beginning if none does."""
    output = output.replace("\0", "").strip()
    errors = [line for line in output.splitlines() if "error" in line.lower()]
    return "\n".join(errors)[:_OUTPUT] or output[:_OUTPUT]

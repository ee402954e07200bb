"""Reading what a compiler wrote about a kernel into its cubin, an ELF file."""

from __future__ import annotations

import struct
from collections.abc import Iterator

_PARAMETER = 0x17  # EIATTR_KPARAM_INFO: an entry for each parameter, its size in the high bits
_SIZED = 4  # EIFMT_SVAL: an attribute that is followed by as many bytes as it says


def parameter_sizes(code: bytes, kernel: str) -> list[int] | None:
    """Return the bytes of each parameter, in order; None if the file does not tell."""
    for name, content in _sections(code):
        if name == f".nv.info.{kernel}":
            found = dict(_parameters(content))
            return [found[index] for index in sorted(found)]
    return None


def _sections(code: bytes) -> Iterator[tuple[str, bytes]]:
    (start,) = struct.unpack_from("<Q", code, 40)
    count, names = struct.unpack_from("<HH", code, 60)
    headers = [struct.unpack_from("<IIQQQQ", code, start + 64 * i) for i in range(count)]
    for name, _, _, _, offset, size in headers:
        at = headers[names][4] + name
        yield code[at : code.index(0, at)].decode(), code[offset : offset + size]


def _parameters(content: bytes) -> Iterator[tuple[int, int]]:
    at = 0
    while at < len(content):
        form, attribute, size = struct.unpack_from("<BBH", content, at)
        if (form, attribute) == (_SIZED, _PARAMETER):
            _, index, _, flags = struct.unpack_from("<IHHI", content, at + 4)
            yield index, flags >> 18
        at += 4 + (size if form == _SIZED else 0)

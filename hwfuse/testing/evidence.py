"""Evidence: what has been proved of each implementation on each arch, and how strongly.

The tests record what they prove, a line of JSON each, in the file that ``EVIDENCE_FILE`` names.
``python -m hwfuse.testing.evidence BACKEND LINES PAGE`` turns the lines into ``evidence.json`` in
that backend's package, which `hwfuse parity --evidence` prints, and into the table of a page.
Nothing in either is written by hand.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hwfuse import _spec, _state

# From the weakest to the strongest; each says what it is worth.
LEVELS = {
    "contract": "calls bind to the vendor's signatures; the values are those of a stand-in",
    "compiled": "compiled for the arch, offline: spills, shared memory, instructions",
    "interpreted": "the kernels ran in Triton's corrected interpreter, on a CPU",
    "isa-emulated": "machine code of the arch ran in an emulator",
    "vendor-binary-emulated": "the vendor's shipped machine code ran in an emulator",
    "hardware": "ran on the device",
}
_VARIABLE = "EVIDENCE_FILE"
_START, _END = "<!-- evidence: written by the tests -->", "<!-- end of evidence -->"


@dataclass
class Row:
    """What is proved of an implementation of an op on an arch: level to how many checks passed."""

    op: str
    implementation: str
    arch: str
    levels: dict[str, int] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)
    by: list[str] = field(default_factory=list)

    @property
    def level(self) -> str:
        """The strongest level of which nothing failed, or ``none``."""
        return next((one for one in reversed(LEVELS) if one in self.levels), "none")


def record(
    op: str, implementation: str, target: str, level: str, *, passed: bool = True, by: str = ""
) -> None:
    """Note one check, if the environment names a file for that.

    Args:
        op: The op.
        implementation: Its id.
        target: ``rocm:gfx942`` or ``gfx942``.
        level: One of `LEVELS`.
        passed: Whether the check passed; a level of which one failed is not reached.
        by: What it was checked with, if that is more than this project: ``aiter 0.1.7``.
    """
    if level not in LEVELS:
        raise ValueError(f"level is {level!r}, needs one of {', '.join(LEVELS)}")
    path = os.environ.get(_VARIABLE)
    if path:
        arch = target.rpartition(":")[2]
        line = [op, implementation, arch, level, passed, by]
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def collect(lines: Iterable[str]) -> list[Row]:
    """Return a row per op, implementation and arch, in the order of the ops."""
    rows: dict[tuple[str, str, str], Row] = {}
    for line in lines:
        op, implementation, arch, level, passed, by = json.loads(line)
        row = rows.setdefault((op, implementation, arch), Row(op, implementation, arch))
        counts = row.levels if passed else row.failed
        counts[level] = counts.get(level, 0) + 1
        if by and by not in row.by:
            row.by.append(by)
    for row in rows.values():
        row.levels = {name: row.levels[name] for name in LEVELS
                      if name in row.levels and name not in row.failed}  # fmt: skip
        row.by.sort()
    return [rows[key] for key in sorted(rows)]


def recorded() -> list[Row]:
    """Return what is recorded in the packages of the loaded backends."""
    rows = []
    for folder in _folders().values():
        path = folder / "evidence.json"
        if path.is_file():
            rows += [Row(**one) for one in json.loads(path.read_text(encoding="utf-8"))]
    return rows


def table(rows: Iterable[Row]) -> Iterator[tuple[str, str, str, str, str, str]]:
    """Yield what is shown of each row: op, implementation, arch, level, checks, made with."""
    for row in rows:
        checks = ", ".join(f"{count} {level}" for level, count in row.levels.items())
        yield row.op, row.implementation, row.arch, row.level, checks, "; ".join(row.by)


def lacking(rows: Iterable[Row], backend: str, arches: Iterable[str]) -> list[str]:
    """Say which implementations of a backend lack evidence on one of these arches.

    A Triton kernel must be interpreted and compiled, anything else at least keep its contract; and
    a pretended device is no hardware.
    """
    found = {(row.op, row.implementation, row.arch): row for row in rows}
    texts = []
    for op in _spec.names():
        for one in _state.registry().implementations(op).values():
            if one.backend != backend:
                continue
            needed = ("compiled", "interpreted") if one.provider == "triton" else ("contract",)
            for arch in arches if not one.requires.arch else one.requires.arch:
                row = found.get((op, one.id, arch)) or Row(op, one.id, arch)
                missing = [level for level in needed if level not in row.levels]
                if missing:
                    failed = f", of which {row.failed} failed" if row.failed else ""
                    texts.append(f"{op}, {one.id} on {arch}: not {' or '.join(missing)}{failed}")
    return texts


def page(text: str, rows: Iterable[Row]) -> str:
    """Return a page with the table between its two marks written anew: a column for each arch."""
    rows = list(rows)
    arches = sorted({row.arch for row in rows}, key=lambda arch: (len(arch), arch))
    lines = [("op", "implementation", *arches, "with"), ("---",) * (len(arches) + 3)]
    for key in dict.fromkeys((row.op, row.implementation) for row in rows):
        mine = {row.arch: row for row in rows if (row.op, row.implementation) == key}
        cells = [mine[arch].level if arch in mine else "" for arch in arches]
        makers = dict.fromkeys(name for row in mine.values() for name in row.by)
        lines.append((*key, *cells, "; ".join(makers)))
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    before, _, rest = text.partition(_START)
    _, _, after = rest.partition(_END)
    return f"{before}{_START}\n{body}\n{_END}{after}"


def _folders() -> dict[str, Path]:
    folders = {}
    for name, backend in _state.registry().backends.items():
        spec = importlib.util.find_spec(backend.package)
        if spec and spec.submodule_search_locations:
            folders[name] = Path(spec.submodule_search_locations[0])
    return folders


def _write(backend: str, lines: Path, paper: Path) -> int:
    """Write both; 1 if an implementation lacks what it must have."""
    rows = [
        row
        for row in collect(lines.read_text(encoding="utf-8").splitlines())
        if row.implementation.partition("/")[0] == backend
    ]
    text = ",\n".join(json.dumps(asdict(row)) for row in rows)
    path = _folders()[backend] / "evidence.json"
    path.write_text(f"[\n{text}\n]\n", encoding="utf-8")
    paper.write_text(page(paper.read_text(encoding="utf-8"), rows), encoding="utf-8")
    problems = lacking(rows, backend, {row.arch for row in rows} & {"gfx942", "gfx950"})
    sys.stderr.writelines(f"{problem}\n" for problem in problems)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(_write(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])))

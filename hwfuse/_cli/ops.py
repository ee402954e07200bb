"""List the ops, their implementations, and what each implementation needs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hwfuse import _spec, _state
from hwfuse._cli import _ops_page
from hwfuse._cli._output import emit, say, table
from hwfuse._errors import InputError, suggestion
from hwfuse._implementation import Implementation

BEGIN = "<!-- ops table: hwfuse ops --markdown -->"
END = "<!-- end of ops table -->"
_TRAITS = ("differentiable", "deterministic", "batch_invariant", "experimental")


def arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:  # noqa: ARG001
    """Declare the options."""
    parser.add_argument("op", metavar="OP", nargs="*", help="only these ops")
    parser.add_argument("--backend", metavar="B", action="append", help="only this; may repeat")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print everything as JSON")
    form.add_argument("--markdown", action="store_true", help="op × implementation, for a README")
    form.add_argument("--update", metavar="FILE", type=Path, help="renew that table in a file")
    form.add_argument(
        "--docs", metavar="FILE", type=Path, help="write the ops' contracts to a file"
    )


def run(options: argparse.Namespace) -> int:
    """Print the table."""
    check_backends(options.backend)
    chosen = options.op or _spec.names()
    is_published = options.markdown or options.update or options.docs
    backends = options.backend or (_ours() if is_published else None)
    found = {op: implementations(op, backends) for op in chosen}
    if options.json:
        emit([describe(one) for per_op in found.values() for one in per_op])
    elif options.markdown:
        say(markdown(found))
    elif options.update:
        update(options.update, markdown(found))
    elif options.docs:
        options.docs.write_text(_ops_page.page(found), encoding="utf-8")
    else:
        rows = [row for op, per_op in found.items() for row in _rows(op, per_op)]
        table(("op", "implementation", "runs on", "needs"), rows)
    return 0


def _ours() -> list[str]:
    """Return our own backends: our README is not about what is installed beside us."""
    return [name for name, by in _state.registry().sources.items() if by.split()[0] == "hwfuse"]


def implementations(op: str, backends: Sequence[str] | None = None) -> list[Implementation]:
    """Return the implementations of an op, the reference first, then as the backends list them."""
    _spec.load(op)
    found = _state.registry().implementations(op).values()
    kept = [one for one in found if not backends or one.backend in backends]
    return sorted(kept, key=lambda one: one.vendor is not None)


def check_backends(names: Sequence[str] | None) -> None:
    """Raise InputError for the name of a backend that is not loaded."""
    known = _state.registry().backends
    for name in names or ():
        if name not in known:
            needed = f"one of {', '.join(known)}{suggestion(name, known)}"
            raise InputError("--backend", repr(name), needed)


def describe(one: Implementation) -> dict[str, Any]:
    """Return everything that an implementation declares, as plain JSON values."""
    return {
        "op": one.op,
        "id": one.id,
        "vendor": one.vendor,
        "arch": list(one.requires.arch),
        "packages": list(one.requires.packages),
        "facts": [fact.source for fact in one.requires.facts],
        "copies": dict(one.copies),
        **{trait: getattr(one.requires, trait) for trait in _TRAITS},
        "problem": one.problem,
        "file": str(one.path) if one.path else None,
    }


def markdown(found: dict[str, list[Implementation]]) -> str:
    """Return op × implementation; a cell says on which arches it runs."""
    ids = dict.fromkeys(one.id for per_op in found.values() for one in per_op)
    lines = ["| op | " + " | ".join(ids) + " |", "|---" * (len(ids) + 1) + "|"]
    for op, per_op in found.items():
        cells = {one.id: runs_on(one) for one in per_op}
        row = " | ".join(cells.get(identifier, "") for identifier in ids)
        lines.append(f"| `{op}` | {row} |")
    return "\n".join(lines)


def update(path: Path, table: str) -> None:
    """Put the table between the two comments that mark its place in a file."""
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise InputError("--update", str(path), f"a file with the lines {BEGIN!r} and {END!r}")
    path.write_text(f"{before}{begin}\n{table}\n{end}{after}", encoding="utf-8")


def runs_on(one: Implementation) -> str:
    """Say on which devices an implementation runs."""
    text = ", ".join(one.requires.arch) or one.vendor or "every device"
    return f"{text} (experimental)" if one.requires.experimental else text


def _rows(op: str, found: Sequence[Implementation]) -> list[tuple[str, str, str, str]]:
    if not found:
        return [(op, "none", "", "")]
    rows: list[tuple[str, str, str, str]] = []
    for one in found:
        needs = [*one.requires.packages, *(fact.source for fact in one.requires.facts)]
        first = f"unusable: {one.problem}" if one.problem else "; ".join(needs)
        rows.append(("" if rows else op, one.id, runs_on(one), first))
    return rows

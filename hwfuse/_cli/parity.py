"""Prove every implementation right against the reference, and print what was proved.

  hwfuse parity fused_qkvzba --backend cuda --device cuda:sm90

What the accelerator here cannot run is tried on the CPU, pretended, in Triton's interpreter.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from hwfuse import _device, _spec
from hwfuse._cli._output import emit, heading, progress, say, table
from hwfuse._cli.ops import check_backends

if TYPE_CHECKING:
    from hwfuse import testing

_MOST_FAILURES = 5  # shown in full; one mistake often fails many checks


def arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:  # noqa: ARG001
    """Declare the options."""
    parser.add_argument("op", metavar="OP", nargs="*", help="only these ops")
    parser.add_argument("--backend", metavar="B", action="append", help="only this; may repeat")
    parser.add_argument("--device", metavar="D", help="only cuda:sm90, only cpu, …")
    parser.add_argument("--matrix", metavar="FILE", help="Python file with a MATRIX of inputs")
    parser.add_argument(
        "--evidence", action="store_true", help="print what the tests have recorded; run nothing"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(options: argparse.Namespace) -> int:
    """Run all checks; 1 if one failed or nothing was proved."""
    from hwfuse import testing

    for op in options.op:
        _spec.load(op)
    check_backends(options.backend)
    if options.evidence:
        return _evidence(options)
    with progress("parity") as step:
        report = testing.run(
            options.op or None,
            options.backend,
            options.device,
            matrix=options.matrix,
            progress=step,
        )
    if options.json:
        emit(report.to_dict())
    else:
        show(report)
    return 0 if report.ok else 1


def show(report: testing.Report) -> None:
    """Print the matrix, then what failed, then why something was not tried."""
    rows = [
        (op, identifier, target, str(line.passed), str(len(line.failed)),
         str(line.skipped.total()), line.unreached or "")
        for (op, identifier, target), line in report.lines.items()
    ]  # fmt: skip
    table(("op", "implementation", "target", "passed", "failed", "skipped", ""), rows)
    failures = [text for line in report.lines.values() for text in line.failed.items()]
    if failures:
        heading("Failed")
    for name, text in failures[:_MOST_FAILURES]:
        say(f"  {name}")
        say("".join(f"    {line}\n" for line in text.splitlines()))
    if len(failures) > _MOST_FAILURES:
        say(f"  and {len(failures) - _MOST_FAILURES} more; --json shows all")
    reasons = dict.fromkeys(why for line in report.lines.values() for why in line.skipped)
    if reasons:
        heading("Skipped")
    for reason in reasons:
        say(f"  {reason}")
    if _interpreted(report):
        from hwfuse.testing import CORRECTIONS

        heading("Ran in Triton's interpreter, on a CPU, which is corrected in:")
        for correction in CORRECTIONS:
            say(f"  {correction}")
    passed = sum(line.passed for line in report.lines.values())
    heading(f"{passed} passed, {len(failures)} failed")


def _evidence(options: argparse.Namespace) -> int:
    """Print the recorded evidence of these ops and backends; 1 if there is none."""
    from hwfuse.testing import evidence

    rows = [
        row for row in evidence.recorded()
        if (not options.op or row.op in options.op)
        and (not options.backend or row.implementation.partition("/")[0] in options.backend)
        and (not options.device or row.arch == options.device.rpartition(":")[2])
    ]  # fmt: skip
    if options.json:
        emit([{**vars(row), "level": row.level} for row in rows])
        return 0 if rows else 1
    heads = ("op", "implementation", "arch", "evidence", "checks passed", "with")
    table(heads, list(evidence.table(rows)))
    heading("Evidence, from the weakest to the strongest:")
    table(("", ""), list(evidence.LEVELS.items()))
    return 0 if rows else 1


def _interpreted(report: testing.Report) -> bool:
    """Tell whether a Triton kernel ran for a target that is not a device of this machine."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = {str(_device.target_of(torch.device("cuda", index))) for index in range(count)}
    ran = {(identifier, target) for (_, identifier, target), line in report.lines.items()
           if line.passed or line.failed}  # fmt: skip
    return any(identifier.endswith("/triton") and target not in here for identifier, target in ran)

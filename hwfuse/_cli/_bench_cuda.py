"""`hwfuse bench --device cuda`: measure in other processes, show and save what comes."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from hwfuse._bench import about, peers, report, shapes
from hwfuse._bench.report import Report
from hwfuse._bench.run import Job, measured, warm
from hwfuse._cli._output import complain, emit, heading, progress, say, table
from hwfuse._errors import HwfuseError, InputError

_JOBS = 8
_PATIENCE = 300.0  # s: CUDA C++ of some libraries takes minutes to compile
_DEFAULT_PEERS = "torch,compile"
FILES = ("bench.csv", "bench.md", "bench.png")


def run(options: argparse.Namespace) -> int:
    """Measure the ops beside the peers; 1 if an implementation is wrong."""
    job = _job(options)
    goals = report.read_goals(options.goals) if options.goals else None
    if not torch.cuda.is_available():
        raise HwfuseError(
            "--device cuda: torch finds no GPU here; --device cpu measures without one"
        )
    result = Report({"command": about.command()})
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    if options.add and (options.out / FILES[0]).exists():
        result.rows = report.read_csv(options.out / FILES[0]).rows
    _measure(job, result, options)
    result.derive(goals)
    _show(result, as_json=options.json)
    if options.out:
        save(result, options.out)
    return int(bool(result.wrong))


def _job(options: argparse.Namespace) -> Job:
    """Check the options and return what they ask for."""
    names = options.shape.split(",") if options.shape else []
    tasks = shapes.select(options.what, names, options.m)
    libraries = peers.read(options.against or _DEFAULT_PEERS)
    if options.jobs is not None and options.jobs < 0:
        raise InputError("--jobs", options.jobs, "0 or more")
    if options.patience is not None and options.patience <= 0:
        raise InputError("--patience", options.patience, "more than 0 seconds")
    if options.add and not options.out:
        raise InputError("--add", "no --out", "--out with the folder to add to")
    return Job(tasks, libraries, options.rounds, options.patience or _PATIENCE)


def _measure(job: Job, result: Report, options: argparse.Namespace) -> None:
    jobs = _JOBS if options.jobs is None else options.jobs
    with progress("bench") as step:
        if num_workers := min(jobs, len(job.tasks), max(1, (os.cpu_count() or 1) // 2)):
            warm(job, num_workers, step)
        for event in measured(job, step):
            _take(event, result)
            if options.out:  # what is measured is not lost if the rest fails
                report.write_csv(result, options.out / FILES[0])


def redraw(options: argparse.Namespace) -> int:
    """Make the table and the plot of a CSV again, in the folder where it lies."""
    result = report.read_csv(options.redraw / FILES[0])
    result.derive(report.read_goals(options.goals) if options.goals else None)
    save(result, options.out or options.redraw)
    return 0


def save(result: Report, folder: Path) -> None:
    """Write the three files, the plot last: it needs a library."""
    folder.mkdir(parents=True, exist_ok=True)
    table_file, page, picture = (folder / name for name in FILES)
    report.write_csv(result, table_file)
    page.write_text(report.to_markdown(result), encoding="utf-8")
    try:
        from hwfuse._bench import plot

        plot.draw(result, picture)
    except HwfuseError as error:
        complain(f"{picture} is not drawn: {error}")


def _take(event: dict[str, object], result: Report) -> None:
    match event:
        case {"row": dict(row)}:
            result.add(row)
        case {"about": dict(machine), "missing": dict(missing)}:
            result.about |= machine
            result.missing |= missing
        case {"crash": [op, shape, m, who], "why": why}:
            row = dict.fromkeys(report.COLUMNS)
            row |= {"op": op, "shape": shape, "m": m, "implementation": who, "bytes": 0}
            kind = report.OURS if "/" in str(who) else report.PEER
            row |= {
                "kind": kind,
                "problem": f"the process ended: {why}",
                "is_wrong": kind == report.OURS,
            }
            result.add(row | {"how": "", "floor": "", "variant": "", "note": ""})
        case {"problem": text}:
            complain(str(text))


def _show(result: Report, *, as_json: bool) -> None:
    if as_json:
        emit({"about": result.about, "missing": result.missing, "rows": result.rows})
        return
    say(", ".join(f"{name} {value}" for name, value in result.about.items() if name != "command"))
    say()
    cells = result.cells()
    used = [i for i in range(len(report.HEADERS)) if any(row[i] for row in cells)]
    table([report.HEADERS[i] for i in used], [[row[i] for i in used] for row in cells])
    if result.missing:
        heading("Libraries that are not here")
        for name, why in result.missing.items():
            say(f"  {name}: {why}")
    if problems := result.problems():
        heading("Not timed")
        for text in problems:
            say(f"  {text}")

"""What came out, as rows that can be shown, saved and compared with goals."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hwfuse._bench.shapes import SHAPES
from hwfuse._errors import ConfigError, InputError

OURS, PEER, PLAIN = "hwfuse", "peer", "reference"
ALL_M = "all"
COLUMNS = (
    "op", "shape", "m", "implementation", "kind", "us", "least_us", "most_us", "how",
    "launches", "host_us",
    "bytes", "gb_per_s", "floor_us", "floor", "over_floor", "over_best_peer", "goal_us", "goal",
    "variant", "note", "problem", "is_wrong", "seconds",
)  # fmt: skip
HEADERS = (
    "op", "shape", "M", "implementation", "µs", "GB/s", "over floor", "of best peer",
    "launches", "host µs", "goal", "variant",
)  # fmt: skip
_NUMBERS = (
    "us", "least_us", "most_us", "launches", "host_us", "floor_us", "over_floor", "over_best_peer",
)  # fmt: skip

Case = tuple[str, str, int]
Goal = float | str | list[float | str]
Goals = Mapping[tuple[str, str, int | str], Goal]
Fields = dict[str, Any]


@dataclass
class Report:
    """All rows, and what they belong to.  *about*: device, versions, date, command."""

    about: dict[str, str] = field(default_factory=dict)
    rows: list[Fields] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)

    def add(self, row: Mapping[str, Any]) -> None:
        """Add one contestant's row, in the place of an earlier one if it is measured again."""
        key = _key(row)
        self.rows = [each for each in self.rows if _key(each) != key] + [dict(row)]

    def derive(self, goals: Goals | None = None) -> None:
        """Fill in what follows from the times: rates, ratios, goals; sort the rows."""
        best: dict[Case, float] = {}
        for row in self.rows:
            if row["kind"] == PEER and row["us"]:
                case = _case(row)
                best[case] = min(best.get(case, row["us"]), row["us"])
        for row in self.rows:
            us, case = row["us"], _case(row)
            row["gb_per_s"] = row["bytes"] / us / 1e3 if us else None
            row["over_floor"] = us / row["floor_us"] if us and row["floor_us"] else None
            row["over_best_peer"] = us / best[case] if us and case in best else None
            goal = self._goal_us(row, goals) if row["kind"] == OURS and goals else None
            row["goal_us"] = goal
            row["goal"] = ("met" if us <= goal else "missed") if goal and us else ""
        self.rows.sort(key=_order)

    def _goal_us(self, row: Fields, goals: Goals) -> float | None:
        """Return the goal of a row in µs: the easiest of several."""
        op, shape, m = _case(row)
        goal = goals.get((op, shape, m), goals.get((op, shape, ALL_M), []))
        beside = {
            each["implementation"]: each["us"] for each in self.rows if _case(each) == _case(row)
        }
        beside["floor"] = row["floor_us"]
        found = []
        for each in goal if isinstance(goal, list) else [goal]:
            number, _, name = str(each).partition(" ")
            us = beside.get(name) if name else 1.0
            if us:
                found.append(us + float(number) if number.startswith("+") else us * float(number))
        return max(found, default=None)

    @property
    def timed(self) -> list[Fields]:
        """The rows that have a time."""
        return [row for row in self.rows if row["us"]]

    @property
    def wrong(self) -> list[Fields]:
        """Our own rows whose results are wrong."""
        return [row for row in self.rows if row["is_wrong"] and row["kind"] != PEER]

    def cells(self) -> list[tuple[str, ...]]:
        """Return the table under `HEADERS`; a floor ends each case."""
        result: list[tuple[str, ...]] = []
        timed = self.timed
        for i, row in enumerate(timed):
            result.append(_cells(row))
            is_last = i + 1 == len(timed) or _case(timed[i + 1]) != _case(row)
            if is_last and row["floor_us"]:
                us = row["floor_us"]
                rate = f"{row['bytes'] / us / 1e3:.0f}"
                name = f"floor: {row['floor']}"
                result.append((*map(str, _case(row)), name, _us(us), rate, *[""] * 6))
        return result

    def problems(self) -> list[str]:
        """Return a line for each row without a time, equal ones joined."""
        where: dict[tuple[str, str, str], list[str]] = {}
        for row in self.rows:
            if row["problem"]:
                key = row["op"], row["implementation"], row["problem"]
                where.setdefault(key, []).append(f"{row['shape']} m={row['m']}")
        return [
            f"{op}, {who} ({cases[0]}{f' and {len(cases) - 1} more' if cases[1:] else ''}): {why}"
            for (op, who, why), cases in where.items()
        ]


def read_goals(path: Path) -> Goals:
    """Read ``op: {shape: {m: goal}}`` from a YAML file; the m ``all`` is every one not listed.

    A goal is a number of µs, or text: ``1.1 floor`` and ``1.02 sglang: jit`` are multiples of what
    was measured beside it, ``+0.03 sglang: jit`` that much more; of a list the easiest counts.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        goals = {
            (op, shape, m if m == ALL_M else int(m)): goal
            for op, shapes in data.items()
            for shape, by_m in shapes.items()
            for m, goal in by_m.items()
        }
        for goal in goals.values():
            for each in goal if isinstance(goal, list) else [goal]:
                float(str(each).partition(" ")[0])
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: needs op: {{shape: {{m: goal}}}}: {error}") from error
    return goals


def write_csv(report: Report, path: Path) -> None:
    """Write every row, with what they belong to in lines that start with ``#``."""
    with path.open("w", encoding="utf-8", newline="") as file:
        for name, value in report.about.items():
            file.write(f"# {name}: {value}\n")
        for name, value in report.missing.items():
            file.write(f"# missing {name}: {value}\n")
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        for row in report.rows:
            writer.writerow({name: _plain(name, row.get(name)) for name in COLUMNS})


def read_csv(path: Path) -> Report:
    """Read what `write_csv` wrote."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError("--redraw", path, f"a readable bench.csv: {error.strerror}") from error
    report = Report()
    for line in lines:
        if line.startswith("# "):
            name, _, value = line[2:].partition(": ")
            first, _, rest = name.partition(" ")
            if first == "missing" and rest:
                report.missing[rest] = value
            else:
                report.about[name] = value
    for row in csv.DictReader(line for line in lines if not line.startswith("#")):
        if not {"op", "shape", "m", "us"} <= row.keys():
            raise InputError("--redraw", path, f"the columns {', '.join(COLUMNS)}")
        numbers = {name: float(row[name]) if row.get(name) else None for name in _NUMBERS}
        report.rows.append(
            {**row, **numbers, "m": int(row["m"]), "bytes": int(row["bytes"]),
             "is_wrong": row["is_wrong"] == "True"}
        )  # fmt: skip
    return report


def to_markdown(report: Report) -> str:
    """Return a page: what was measured where and how, a table for each op, what is missing."""
    lines = [f"# Benchmark on {report.about.get('device', 'an unknown device')}", ""]
    lines += [f"- {name}: {value}" for name, value in report.about.items() if name != "command"]
    lines += ["", f"```text\n{report.about.get('command', 'hwfuse bench')}\n```", "", _METHOD, ""]
    lines += ["![Time over the floor](bench.png)", ""]
    by_op: dict[str, list[tuple[str, ...]]] = {}
    for cells in report.cells():
        by_op.setdefault(cells[0], []).append(cells[1:])
    for op, rows in by_op.items():
        used = [i for i in range(len(HEADERS) - 1) if any(row[i] for row in rows)]
        headers = [HEADERS[1:][i] for i in used]
        lines += [f"## {op}", "", _line(headers), _line(["---"] * len(used))]
        lines += [_line([row[i] for i in used]) for row in rows] + [""]
    if report.missing or report.problems():
        lines += ["## Not measured", ""]
        lines += [f"- {name}: {why}" for name, why in report.missing.items()]
        lines += [f"- {text}" for text in report.problems()] + [""]
    return "\n".join(lines)


_METHOD = (
    "µs: device time of a call in a replayed CUDA graph, median; inputs and outputs rotate beyond "
    "the L2 cache; every contestant's results were compared with the reference's before. over "
    "floor: a plain copy of as many bytes, for matrix products the read of them or the measured "
    "matrix peak, in the same run. of best peer: below 1 is faster than the fastest library. "
    "launches: nodes of a CUDA graph of one call. host µs: what the host needs to issue an eager "
    "call. hot: half of all tokens go to one expert."
)


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    goal = f"{row['goal']} ({_us(row['goal_us'])})" if row.get("goal") else ""
    name = row["implementation"] + (f" ({row['note']})" if row["note"] else "")
    how = "" if row["how"] == "graph" else f" {row['how']}"
    return (
        row["op"], row["shape"], str(row["m"]), name, _us(row["us"]) + how,
        f"{row['gb_per_s']:.0f}", f"{row['over_floor']:.2f}" if row["over_floor"] else "",
        f"{row['over_best_peer']:.2f}" if row["over_best_peer"] else "",
        f"{row['launches']:.0f}" if row["launches"] else "",
        f"{row['host_us']:.1f}" if row["host_us"] else "", goal, row["variant"],
    )  # fmt: skip


def _us(us: float) -> str:
    return f"{us:.2f}" if us < 100 else f"{us:.0f}"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _plain(name: str, value: Any) -> Any:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) and name != "m" else value


def _case(row: Mapping[str, Any]) -> Case:
    return row["op"], row["shape"], row["m"]


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return (*_case(row), row["implementation"])


def _order(row: Mapping[str, Any]) -> tuple[Any, ...]:
    names: Sequence[str] = [each.name for each in SHAPES.get(row["op"], ())]
    place = names.index(row["shape"]) if row["shape"] in names else len(names)
    kinds = (OURS, PEER, PLAIN)
    return row["op"], place, row["m"], kinds.index(row["kind"]), row["us"] or 1e9

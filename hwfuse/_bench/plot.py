"""One picture of a report: how far from the floor each op is, beside the best library."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hwfuse._bench.report import OURS, PEER, Report
from hwfuse._errors import HwfuseError

_OURS, _PEER = "#0b6e4f", "#c8553d"


def draw(report: Report, path: Path) -> None:
    """Write a PNG: a line for each op and shape, panels for the least, a middle and the most M."""
    try:
        import matplotlib as mpl

        mpl.use("Agg")  # no window
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise HwfuseError("the plot needs matplotlib: pip install 'hwfuse[cli]'") from error
    best = _best(report)
    names = list(dict.fromkeys((op, shape) for op, shape, _ in best))[::-1]
    figure, axes = plt.subplots(
        1, 3, sharex=True, sharey=True, figsize=(12, 1.6 + 0.24 * len(names)), layout="constrained"
    )
    for panel, (title, of) in zip(axes, _PANELS, strict=True):
        for y, name in enumerate(names):
            chosen = best[*name, of(sorted(m for *case, m in best if tuple(case) == name))]
            panel.plot(list(chosen.values()), [y] * len(chosen), color="#bbbbbb", zorder=1)
            for kind, color in ((PEER, _PEER), (OURS, _OURS)):
                if kind in chosen:
                    panel.scatter(chosen[kind], y, color=color, s=28, zorder=2)
        _decorate(panel, title, names)
    axes[0].set_xlim(left=min(0.6, axes[0].get_xlim()[0]))
    handles = [
        plt.Line2D([], [], marker="o", linestyle="", color=color, label=label)
        for color, label in ((_OURS, "hwfuse"), (_PEER, "best other library here"))
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    device = report.about.get("device", "")
    figure.suptitle(f"Time over the floor measured in the same run ({device}); left is better")
    figure.savefig(path, dpi=110)
    plt.close(figure)


_PANELS: tuple[tuple[str, Callable[[list[int]], int]], ...] = (
    ("least M (decode)", min),
    ("M in between", lambda ms: min(ms, key=lambda m: abs(m - 512))),
    ("most M (prefill)", max),
)


def _decorate(panel: Any, title: str, names: list[tuple[str, str]]) -> None:
    panel.set_title(title, fontsize=10)
    panel.set_xscale("log")
    panel.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    panel.minorticks_off()
    panel.axvline(1, color="black", linewidth=0.8)
    panel.grid(axis="x", color="#eeeeee", zorder=0)
    panel.set_yticks(range(len(names)), [f"{op}  {shape}" for op, shape in names], fontsize=8)
    panel.set_ylim(-0.7, len(names) - 0.3)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)


def _best(report: Report) -> dict[tuple[str, str, int], dict[str, float]]:
    """Return for each case the least time over the floor of ours and of the peers."""
    best: dict[tuple[str, str, int], dict[str, float]] = {}
    for row in report.timed:
        if row["kind"] in (OURS, PEER) and row["over_floor"]:
            of_case = best.setdefault((row["op"], row["shape"], row["m"]), {})
            ratio = row["over_floor"]
            of_case[row["kind"]] = min(ratio, of_case.get(row["kind"], ratio))
    return best

"""``hwfuse bench dispatch``; the limits themselves depend on the machine and are not tested."""

from __future__ import annotations

import json

import pytest

import hwfuse
from hwfuse._cli import bench


@pytest.fixture
def quick(monkeypatch):
    """Measure too little to be exact, and start no other process."""
    monkeypatch.setattr(bench, "_WINDOW", 1e-5)
    monkeypatch.setattr(bench, "_WINDOWS", 3)
    monkeypatch.setattr(bench, "_COLD_CALLS", 2)
    monkeypatch.setattr(bench, "_import_seconds", lambda: 0.05)


def test_bench_json_compares_with_the_direct_call(run, quick):
    """Each contestant has its µs and what that is over the direct call."""
    result = run("bench", "dispatch", "--rounds", "1", "--json")
    data = json.loads(result.out)
    assert result.code == 0
    assert len(data["warm"]) == 8
    direct = data["warm"]["the implementation, called directly"]
    for each in data["warm"].values():
        assert each["over_direct_us"] == pytest.approx(each["us"] - direct["us"])
    assert data["import_seconds"] == 0.05
    assert all(us > 0 for us in data["cold_us"].values())


def test_bench_check_above_a_limit_fails(run, quick, monkeypatch):
    """``--check`` makes a limit an exit code."""
    monkeypatch.setattr(bench, "MOST_SELECTION", 0.0)
    result = run("bench", "dispatch", "--rounds", "1", "--check")
    assert result.code == 1
    assert "OVER  hwfuse.op, six facts:" in result.out


def test_bench_import_seconds_runs_another_process():
    """What an import costs is measured where nothing is imported yet."""
    assert 0 < bench._import_seconds() < 5


def test_bench_selects_by_six_facts():
    """The op that is measured looks at six facts and runs the implementation that needs them."""
    with bench._contestants() as calls:
        selected, _ = calls[bench._SELECTED]
        inputs = bench._inputs()
        assert hwfuse.explain(selected.spec.name, **inputs).chosen == "bench/six"
    assert len(set(bench.FACTS)) == 6

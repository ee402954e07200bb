"""``hwfuse bench``; what the times are depends on the machine and is not tested."""

from __future__ import annotations

import json

import pytest
import torch

import hwfuse
from hwfuse import _spec
from hwfuse._cli import _bench_dispatch, _bench_launch, _bench_ops
from hwfuse.testing import naive


@pytest.fixture
def quick(monkeypatch):
    """Measure too little to be exact, and start no other process."""
    monkeypatch.setattr(_bench_dispatch, "_WINDOW", 1e-5)
    monkeypatch.setattr(_bench_dispatch, "_WINDOWS", 3)
    monkeypatch.setattr(_bench_dispatch, "_COLD_CALLS", 2)
    monkeypatch.setattr(_bench_dispatch, "_import_seconds", lambda: 0.05)


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
    monkeypatch.setattr(_bench_dispatch, "MOST_SELECTION", 0.0)
    result = run("bench", "dispatch", "--rounds", "1", "--check")
    assert result.code == 1
    assert "OVER  hwfuse.op, six facts:" in result.out


def test_bench_import_seconds_runs_another_process():
    """What an import costs is measured where nothing is imported yet."""
    assert 0 < _bench_dispatch._import_seconds() < 5


def test_bench_selects_by_six_facts():
    """The op that is measured looks at six facts and runs the implementation that needs them."""
    with _bench_dispatch._contestants() as calls:
        selected, _ = calls[_bench_dispatch._SELECTED]
        inputs = _bench_dispatch._inputs()
        assert hwfuse.explain(selected.spec.name, **inputs).chosen == "bench/six"
    assert len(set(_bench_dispatch.FACTS)) == 6


def test_bench_json_of_ops_has_both_times_and_their_ratio(run):
    """The reference and the loop are measured on the same inputs."""
    result = run("bench", "w4a8_moe_prep", "q_rms_norm_", "--m", "3", "--rounds", "1", "--json")
    data = json.loads(result.out)
    assert result.code == 0
    assert data["device"] == "cpu"
    assert [row["op"] for row in data["ops"]] == ["w4a8_moe_prep", "q_rms_norm_"]
    assert data["ops"][1]["sizes"] == {"m": 3, "num_q_heads": 8, "head_dim": 256}
    for row in data["ops"]:
        assert row["ratio"] == pytest.approx(row["naive_ms"] / row["reference_ms"])
        assert row["wrong"] is None


def test_bench_of_ops_is_a_table_that_says_it_is_a_cpu_run(run):
    """One line for each op."""
    result = run("bench", "q_rms_norm", "--m", "2", "--rounds", "1")
    assert result.out.startswith("A CPU run in one thread, torch ")
    assert "  q_rms_norm  m=2 num_q_heads=8 head_dim=256  " in result.out


def test_bench_of_an_op_with_wrong_results_times_nothing_and_fails(run, monkeypatch):
    """Correctness comes first."""

    def q_rms_norm(
        q: torch.Tensor, q_weight: torch.Tensor, *, head_dim: int, eps: float = 1e-6
    ) -> torch.Tensor:
        return q.clone()

    monkeypatch.setattr(naive, "q_rms_norm", q_rms_norm)
    monkeypatch.setattr(_bench_ops, "_medians", lambda *_: pytest.fail("timed"))
    result = run("bench", "q_rms_norm", "--m", "2")
    assert result.code == 1
    assert "WRONG, not timed: q_rms_norm: naive/loop: output q: worst" in result.out


def test_bench_without_names_measures_every_op(run, monkeypatch):
    """Each op has its loop, and every pair agrees at the sizes that are measured."""
    monkeypatch.setattr(_bench_ops, "_medians", lambda *_: [1.0, 2.0])
    data = json.loads(run("bench", "--json").out)
    assert [row["op"] for row in data["ops"]] == list(_spec.names())
    assert [row["wrong"] for row in data["ops"]] == [None] * len(data["ops"])


def test_bench_leaves_the_number_of_threads(run):
    """It runs in one, and only while it runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run("bench", "q_rms_norm", "--m", "1", "--rounds", "1")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_bench_on_a_gpu_that_is_not_here_says_so(run, monkeypatch):
    """One line, and what can be done instead."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run("bench", "--device", "cuda")
    assert result.code == 1
    assert result.err == (
        "hwfuse bench: --device cuda: torch finds no GPU here; --device cpu measures without one\n"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fused_qkvzb"], "'fused_qkvzb' is no op (did you mean 'fused_qkvzba'?)"),
        (["dispach"], "'dispach' is no op (did you mean 'dispatch'?)"),
        (["dispatch", "q_rms_norm"], "found dispatch q_rms_norm, needed dispatch alone"),
        (["--rounds", "0"], "--rounds: found 0, needed at least 1"),
        (["q_rms_norm", "--m", "1,2"], "--m: found 1,2, needed one number, or --device cuda"),
    ],
)
def test_bench_of_nonsense_is_refused(run, words, message):
    """Exit code 2: it was asked for wrongly."""
    result = run("bench", *words)
    assert result.code == 2
    assert message in result.err


def test_bench_dispatch_on_a_gpu_that_is_not_here_says_so(run, monkeypatch):
    """What launching costs cannot be measured without one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run("bench", "dispatch", "--device", "cuda")
    assert result.code == 1
    assert "dispatch" not in result.out
    assert result.err == (
        "hwfuse bench: --device cuda: torch finds no GPU here; --device cpu measures the choice "
        "alone\n"
    )


COSTS = {
    "bare_us": 10.0,
    "ops": [
        {"op": "two", "outputs": 2, "launches": 1, "us": {"sizes": 1.0, "op, tier 1": 8.5}},
        {"op": "five", "outputs": 5, "launches": 2, "us": {"op, tier 1": 15.6, "op, tier 2": 12.0}},
    ],
}


@pytest.fixture
def costs(monkeypatch):
    """A GPU, and a plugin whose launches cost what COSTS says."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(_bench_launch, "_costs", lambda name, _: COSTS if name == "cuda" else None)


def test_bench_of_launches_compares_with_multiples_of_a_bare_launch(run, costs):
    """A goal grows with every result beyond two and every kernel beyond one."""
    result = run("bench", "dispatch", "--device", "cuda", "--check")
    assert result.code == 1
    assert "  ok    two, op, tier 1: 0.85 x, at most 0.85\n" in result.out
    assert "  OVER  five, op, tier 1: 1.56 x, at most 1.55\n" in result.out
    assert "  ok    five, op, tier 2: 1.20 x, at most 1.20\n" in result.out
    data = json.loads(run("bench", "dispatch", "--device", "cuda", "--json").out)
    assert data["results"] == [COSTS]
    assert len(data["goals"]) == 3


def test_bench_of_launches_asks_every_plugin_that_can_answer(monkeypatch):
    """Those of other vendors have nothing to say."""
    assert _bench_launch._costs("reference", 1) is None
    import hwfuse_cuda

    monkeypatch.setattr(hwfuse_cuda, "launch_costs", lambda rounds: {"rounds": rounds})
    assert _bench_launch._costs("cuda", 3) == {"rounds": 3}

"""``hwfuse parity``."""

from __future__ import annotations

import json
from collections import Counter

from hwfuse import testing
from hwfuse.testing.parity import Line

KEY = ("fused_qkvzba", "acme/index", "cpu")


def answer(monkeypatch, **line):
    """Let the harness find one line; return what it was asked."""
    asked = []

    def run(*args, **keywords):
        asked.append((args, keywords))
        return testing.Report({KEY: Line(**line)})

    monkeypatch.setattr(testing, "run", run, raising=False)
    return asked


def test_parity_passes_on_what_was_asked(run, monkeypatch):
    """Ops, backends, device and matrix reach the harness."""
    asked = answer(monkeypatch, passed=3)
    words = "fused_qkvzba --backend cuda --backend rocm --device cpu --matrix m.py"
    assert run("parity", *words.split()).code == 0
    ((args, keywords),) = asked
    assert args == (["fused_qkvzba"], ["cuda", "rocm"], "cpu")
    assert keywords["matrix"] == "m.py"


def test_parity_failure_is_shown_and_fails(run, monkeypatch):
    """A failure prints the check's name and text, and is the exit code."""
    answer(monkeypatch, passed=1, failed={"fused_qkvzba-acme/index-cpu-m=1": "output b: wrong"})
    result = run("parity")
    assert result.code == 1
    assert "  fused_qkvzba-acme/index-cpu-m=1\n    output b: wrong\n" in result.out
    assert result.out.endswith("\n1 passed, 1 failed\n")


def test_parity_many_failures_are_counted(run, monkeypatch):
    """Five are shown; one mistake often fails many checks."""
    answer(monkeypatch, failed={f"check {i}": "wrong" for i in range(7)})
    assert "and 2 more; --json shows all" in run("parity").out


def test_parity_skip_shows_its_reason(run, monkeypatch):
    """What was not tried has a reason on the screen."""
    answer(monkeypatch, passed=1, skipped=Counter({"needs deep_gemm": 4}))
    result = run("parity")
    assert "Skipped\n  needs deep_gemm\n" in result.out


def test_parity_nothing_proved_fails(run, monkeypatch):
    """No check at all is no success."""
    answer(monkeypatch)
    assert run("parity").code == 1


def test_parity_json_is_the_report(run, monkeypatch):
    """Scripts get all of it."""
    answer(monkeypatch, passed=2)
    data = json.loads(run("parity", "--json").out)
    assert data["ok"] is True
    assert data["lines"][0]["implementation"] == "acme/index"


def test_parity_unknown_op_is_usage(run):
    """A typo is not an empty matrix."""
    result = run("parity", "fused_qkvz")
    assert (result.code, "did you mean 'fused_qkvzba'" in result.err) == (2, True)


def test_parity_unknown_backend_is_usage(run):
    """Neither is an unknown backend."""
    assert run("parity", "--backend", "cud").code == 2


def test_parity_runs_the_harness(run, tmp_path):
    """One real run, of one row."""
    matrix = tmp_path / "matrix.py"
    matrix.write_text("from hwfuse.testing import row\nMATRIX = {'w4a8_moe_prep': row(m=3)}\n")
    words = ("--backend", "reference", "--device", "cpu", "--matrix", str(matrix))
    result = run("parity", "w4a8_moe_prep", *words)
    assert result.code == 0, result.out
    assert result.out.splitlines()[1].split()[:3] == ["w4a8_moe_prep", "reference/torch", "cpu"]


def test_parity_in_the_interpreter_says_what_is_corrected(run, monkeypatch):
    """A number from the interpreter is worth what its corrections are worth."""
    line = {("fused_qkvzba", "rocm/triton", "rocm:gfx942"): Line(passed=1)}
    monkeypatch.setattr(testing, "run", lambda *_, **__: testing.Report(line), raising=False)
    assert testing.CORRECTIONS[0] in run("parity").out
    answer(monkeypatch, passed=1)  # an implementation of the CPU's own
    assert testing.CORRECTIONS[0] not in run("parity").out

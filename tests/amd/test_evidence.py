"""What the tests record of what they prove, and where it is shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hwfuse._cli import main
from hwfuse.testing import evidence

PAGE = Path(__file__).parents[2] / "docs" / "amd.md"


@pytest.fixture
def lines(tmp_path, monkeypatch):
    """A file that is recorded into; returns its lines."""
    path = tmp_path / "lines"
    monkeypatch.setenv("EVIDENCE_FILE", str(path))
    return lambda: path.read_text().splitlines()


def test_record_without_a_file_does_nothing(monkeypatch):
    """An ordinary test run writes nowhere."""
    monkeypatch.delenv("EVIDENCE_FILE", raising=False)
    evidence.record("op", "acme/x", "gfx942", "compiled")


def test_level_is_the_strongest_of_which_nothing_failed(lines):
    """One failed check takes a level away, however many passed."""
    for level, passed in [("contract", True), ("compiled", True), ("interpreted", True),
                          ("interpreted", False)]:  # fmt: skip
        evidence.record("op", "acme/x", "rocm:gfx942", level, passed=passed, by="aiter 0.1.7")
    (row,) = evidence.collect(lines())
    assert (row.arch, row.level, row.by) == ("gfx942", "compiled", ["aiter 0.1.7"])
    assert row.levels == {"contract": 1, "compiled": 1}


def test_level_that_does_not_exist_is_an_error():
    """Nobody invents one."""
    with pytest.raises(ValueError, match="needs one of contract, compiled"):
        evidence.record("op", "acme/x", "gfx942", "certain")


def test_lacking_names_each_implementation_without_its_evidence():
    """With no evidence at all, all of them, on both arches; a Triton kernel needs two levels."""
    found = evidence.lacking([], "rocm", ["gfx942"])
    assert "fused_qkvzba, rocm/triton on gfx942: not compiled or interpreted" in found
    assert "fp8_blockscale_gemm, rocm/aiter on gfx950: not contract" in found


def test_recorded_amd_evidence_never_says_hardware():
    """There was none."""
    rows = [row for row in evidence.recorded() if row.implementation.startswith("rocm/")]
    assert rows
    assert {row.level for row in rows} <= {"contract", "compiled", "interpreted"}


def test_page_shows_what_is_recorded():
    """docs/amd.md is written by `make evidence`, never by hand."""
    text = PAGE.read_text(encoding="utf-8")
    rows = [row for row in evidence.recorded() if row.implementation.startswith("rocm/")]
    assert evidence.page(text, rows) == text


def test_command_prints_the_table_and_what_its_words_mean(capsys):
    """`hwfuse parity --evidence`, also as JSON."""
    assert main(["parity", "--evidence", "fp8_blockscale_gemm", "--backend", "rocm"]) == 0
    printed = capsys.readouterr().out
    assert "rocm/aiter" in printed
    assert evidence.LEVELS["contract"] in printed
    assert main(["parity", "--evidence", "--json", "--device", "rocm:gfx942"]) == 0
    assert {row["arch"] for row in json.loads(capsys.readouterr().out)} == {"gfx942"}


def test_command_without_evidence_fails(capsys):
    """Nothing recorded is no success."""
    assert main(["parity", "--evidence", "--device", "rocm:gfx90a"]) == 1


def test_writing_the_page_fails_while_an_implementation_lacks_evidence(
    lines, tmp_path, monkeypatch, capsys
):
    """`make evidence` writes what there is, names what is missing, and fails."""
    monkeypatch.setattr(evidence, "_folders", lambda: {"rocm": tmp_path})
    paper = tmp_path / "amd.md"
    paper.write_text("before\n<!-- evidence: written by the tests -->\nold\n"
                     "<!-- end of evidence -->\nafter\n")  # fmt: skip
    evidence.record("fused_qkvzba", "rocm/triton", "gfx942", "compiled", by="Triton 3.7.1")
    evidence.record("fused_qkvzba", "rocm/triton", "gfx1201", "contract")
    evidence.record("fused_qkvzba", "cuda/triton", "sm90", "compiled")
    assert evidence._write("rocm", tmp_path / "lines", paper) == 1
    row = "| fused_qkvzba | rocm/triton | compiled | contract | Triton 3.7.1 |"
    assert row in paper.read_text().splitlines()
    assert paper.read_text().startswith("before\n")
    assert paper.read_text().endswith("\nafter\n")
    assert "cuda" not in paper.read_text()
    assert "fused_qkvzba, rocm/triton on gfx942: not interpreted" in capsys.readouterr().err
    found = json.loads((tmp_path / "evidence.json").read_text())
    assert [one["levels"] for one in found] == [{"contract": 1}, {"compiled": 1}]

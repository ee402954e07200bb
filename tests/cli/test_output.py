"""How the commands print: plain in pipes, drawn by rich on a terminal that has it."""

from __future__ import annotations

import io
import sys

import pytest

from hwfuse._cli import _output


class Terminal(io.StringIO):
    """A stream that says that a person looks at it."""

    def isatty(self):
        """Say so."""
        return True


def test_table_in_a_pipe_is_aligned_text(capsys):
    """Columns are as wide as their widest cell; no colours, no blanks at the end."""
    _output.table(("op", "runs"), [("a", "cuda/triton"), ("long_name", "x")])
    assert (
        capsys.readouterr().out == "  op         runs\n  a          cuda/triton\n  long_name  x\n"
    )


def test_table_without_rows_prints_headers(capsys):
    """No rows, no error."""
    _output.table(("op", "runs"), [])
    assert capsys.readouterr().out == "  op  runs\n"


def test_table_on_a_terminal_is_drawn_by_rich(monkeypatch):
    """On a terminal rich draws it, and a bracket in a cell stays a bracket."""
    pytest.importorskip("rich", reason="extra cli")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    _output.table(("op", "needs"), [("a", "dtype [bold]")])
    assert "dtype [bold]" in terminal.getvalue()


def test_table_on_a_terminal_without_rich_is_plain(monkeypatch):
    """The base install has no rich."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(_output.importlib.util, "find_spec", lambda _name: None)
    _output.table(("op",), [("a",)])
    assert terminal.getvalue() == "  op\n  a\n"


def test_progress_in_a_pipe_is_silent(capsys):
    """Logs of scripts stay clean."""
    with _output.progress("parity") as step:
        step(1, 2, "fused_qkvzba")
    assert capsys.readouterr() == ("", "")


def test_progress_on_a_terminal_without_rich_is_one_line(monkeypatch):
    """One line that is rewritten, and gone at the end."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(_output.importlib.util, "find_spec", lambda _name: None)
    with _output.progress("parity") as step:
        step(1, 2, "fused_qkvzba")
    assert terminal.getvalue() == "\r\x1b[Kparity 1/2 fused_qkvzba\r\x1b[K"


def test_progress_on_a_terminal_is_drawn_by_rich(monkeypatch):
    """With rich it is a bar."""
    pytest.importorskip("rich", reason="extra cli")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with _output.progress("parity") as step:
        step(1, 2, "fused_qkvzba")
    assert "parity fused_qkvzba" in terminal.getvalue()

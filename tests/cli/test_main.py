"""The command line as a whole: help, exit codes, errors."""

from __future__ import annotations

import subprocess
import sys
import warnings

import hwfuse
from hwfuse._cli import doctor


def test_version_printed():
    """``python -m hwfuse`` is the command."""
    command = [sys.executable, "-m", "hwfuse", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"hwfuse {hwfuse.__version__}\n")


def test_help_lists_every_command(run):
    """The help has one line per command, the first of its docstring."""
    result = run("--help")
    assert result.code == 0
    for name in ("doctor", "ops", "explain", "config", "parity", "bench", "warmup", "demo"):
        assert f"    {name} " in result.out


def test_no_command_shows_the_help(run):
    """Without a command there is nothing to do: exit code 2, and what there is."""
    result = run()
    assert result.code == 2
    assert "    doctor " in result.err


def test_unknown_option_gets_a_suggestion(run):
    """A typo is named with the closest option."""
    result = run("explain", "fused_qkvzba", "--num-k-head", "4")
    assert result.code == 2
    assert "unknown --num-k-head (did you mean '--num-k-heads'?)" in result.err


def test_error_of_hwfuse_is_one_message(run):
    """What hwfuse raises on purpose is printed without a traceback."""
    result = run("explain", "fused_qkvzba", "--num-v-heads", "3")
    assert result.code == 2
    assert result.err == (
        "hwfuse explain: num_v_heads: found 3, needed a multiple of num_k_heads = 16, "
        "which the width of qkvz gives\n"
    )


def test_error_with_traceback_shows_where(run):
    """``--traceback`` adds where it arose."""
    result = run("explain", "fused_qkvzba", "--num-v-heads", "3", "--traceback")
    assert result.err.startswith("Traceback (most recent call last)")


def test_warning_of_hwfuse_is_one_line(run, monkeypatch):
    """A warning is for people: no file name, no source line."""

    def warn(_options):
        warnings.warn("acme is missed", hwfuse.HwfuseWarning, stacklevel=1)
        return 0

    monkeypatch.setattr(doctor, "run", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert run("doctor").err == "warning: acme is missed\n"

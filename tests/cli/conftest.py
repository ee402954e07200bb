"""What the command line tests share."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from hwfuse import _state
from hwfuse._cli import main


class Result(NamedTuple):
    """What one command did."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys):
    """Run one command in this process."""

    def run(*words: str) -> Result:
        capsys.readouterr()
        code = main(words)
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture
def settings(monkeypatch):
    """Set HWFUSE_* variables as the environment of one test."""

    def settings(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        _state.forget()

    yield settings
    monkeypatch.undo()
    _state.forget()

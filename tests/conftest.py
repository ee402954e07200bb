"""What all tests share: each starts from the built-in policy and leaves nothing behind."""

from __future__ import annotations

import os

import pytest

from hwfuse import _report, _state


@pytest.fixture(autouse=True)
def built_in_policy(monkeypatch):
    """Start without HWFUSE_* variables, settings, decisions or announcements made before."""
    for name in [name for name in os.environ if name.startswith("HWFUSE_")]:
        monkeypatch.delenv(name)
    _reset()
    yield
    _reset()


def _reset() -> None:
    _state._configured.clear()
    _report.announced.clear()
    _state.decisions.clear()
    _state.forget()

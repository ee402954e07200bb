"""The stand-in for aiter, for as long as a test runs."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from hwfuse import _packages, _state
from hwfuse_rocm import _aiter

ROOT = Path(__file__).parents[2]
PATH = ROOT / "tests" / "fake_aiter" / "stand_in.py"
WHEEL = ROOT / ".venv" / "aiter"  # made by `make aiter`: AMD's 0.1.7 and what it imports
CHECKOUT = "AITER_CHECKOUT"  # an environment variable: a folder with a newer aiter


@pytest.fixture(scope="session")
def stand_in():
    """The stand-in's own module, not importable by any name."""
    spec = importlib.util.spec_from_file_location("_aiter_stand_in", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def installed(monkeypatch, stand_in):
    """Puts a stand-in of one version and arch in place; returns the list of the calls it gets."""

    def forget():
        _packages.missing.cache_clear()
        _aiter.function.cache_clear()
        _aiter.takes.cache_clear()
        _state.forget()

    def install(version, arch, rocm="7.2"):
        calls = []
        found = stand_in.modules(version, arch, calls)
        for name, module in found.items():
            monkeypatch.setitem(sys.modules, name, module)
        versions = {"amd-aiter": "0.1.7", "rocm": rocm, **dict.fromkeys(found, "0.1.7")}
        before = _packages.installed
        monkeypatch.setattr(_packages, "installed", lambda name: versions.get(name) or before(name))
        forget()
        return calls

    yield install
    monkeypatch.undo()
    forget()


@pytest.fixture(scope="module", params=["0.1.7", "head"])
def aiter_source(request):
    """AMD's aiter of one version: (version, folder)."""
    if request.param == "head":
        folder = os.environ.get(CHECKOUT)
        if not folder:
            pytest.skip(f"{CHECKOUT} names no folder with a newer aiter")
    else:
        folder = WHEEL
        if not (folder / "aiter").is_dir():
            pytest.skip("AMD's wheel is not here: make aiter")
    return request.param, Path(folder)


@pytest.fixture(scope="session")
def aiter_libraries():
    """The folder with what AMD's package imports."""
    if not (WHEEL / "pandas").is_dir():
        pytest.skip("what AMD's wheel imports is not here: make aiter")
    return WHEEL


@pytest.fixture(scope="session")
def real_script():
    """The program that imports AMD's package without ROCm."""
    return PATH.with_name("real.py")

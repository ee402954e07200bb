"""Fakes for the tests of the core: implementations in memory, and plugins as installed ones."""

from __future__ import annotations

import functools
import importlib
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from hwfuse import _implementation, _packages, _spec, _state


class Fakes:
    """Implementations in memory.  `ran`: the ids of those that ran, in order."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self._added: list[_implementation.Implementation] = []

    def add(self, identifier, op="fp8_group_quant", *, function=None, vendor=None, **requires):
        """Add an implementation with these REQUIRES; without *function* it returns zeros."""
        spec = _spec.load(op)
        implementation = _implementation.Implementation(
            id=identifier,
            op=op,
            vendor=vendor,
            module="",
            path=None,
            requires=_implementation.parse_requires(requires, spec),
            function=self._counted(identifier, function or functools.partial(_zeros, spec)),
        )
        _state.registry().added.setdefault(implementation.op, {})[implementation.id] = (
            implementation
        )
        self._added.append(implementation)
        _state.forget()
        return implementation

    def remove_all(self) -> None:
        """Take everything back."""
        for implementation in self._added:
            del _state.registry().added[implementation.op][implementation.id]
        _state.forget()

    def _counted(self, identifier, function):
        def call(*args, **kwargs):
            self.ran.append(identifier)
            return function(*args, **kwargs)

        return call


def _zeros(spec, *args, **kwargs):
    outputs = spec.outputs(*args, **kwargs)
    for output in (outputs,) if not isinstance(outputs, tuple) else outputs:
        output.zero_()
    return outputs


@pytest.fixture
def fakes(built_in_policy):
    """Add implementations for one test; `fakes.ran` says which ran."""
    fakes = Fakes()
    yield fakes
    fakes.remove_all()


class Plugins:
    """Installed distributions, each with one plugin, in a folder on sys.path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(self, name, init, files=None, *, distribution=None, version="1.0", package=None):
        """Install a plugin: *init* is its package's source, *files* are further ones by path."""
        package = package or f"hwfuse_{name}"
        self._write(f"{package}/__init__.py", init)
        for path, text in (files or {}).items():
            self._write(f"{package}/{path}", text)
        entry_points = f"[hwfuse]\n{name} = {package}\n"
        self.distribution(
            distribution or f"dist-{name}", version, {"entry_points.txt": entry_points}
        )
        self.reload()

    def distribution(self, name, version, metadata):
        """Write the dist-info folder of a distribution."""
        info = f"{name.replace('-', '_')}-{version}.dist-info"
        head = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        for path, text in {"METADATA": head, **metadata}.items():
            self._write(f"{info}/{path}", text)

    def reload(self):
        """Find and load plugins anew."""
        importlib.invalidate_caches()
        _packages.missing.cache_clear()
        _state._registries.clear()
        _state.forget()

    def _write(self, path, text):
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(dedent(text), encoding="utf-8")


@pytest.fixture
def plugins(built_in_policy, tmp_path_factory, monkeypatch):
    """Install plugins for one test."""
    folder = tmp_path_factory.mktemp("site")
    before = set(sys.modules)
    registries = dict(_state._registries)
    monkeypatch.syspath_prepend(folder)
    plugins = Plugins(folder)
    yield plugins
    for name in set(sys.modules) - before:
        if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    monkeypatch.undo()
    plugins.reload()
    _state._registries.update(registries)

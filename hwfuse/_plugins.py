"""Backends: found by entry point, one pluggy plugin each; never asked to run an op.

A broken plugin is named in `Registry.problems` and stops nobody else.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pluggy

from hwfuse import _implementation, _spec
from hwfuse._device import VENDORS
from hwfuse._implementation import Implementation

hookspec = pluggy.HookspecMarker("hwfuse")
hookimpl = pluggy.HookimplMarker("hwfuse")


@dataclass(frozen=True)
class Backend:
    """One vendor's implementations.

    Args:
        name: First part of the implementation ids, ``cuda`` in ``cuda/triton``.
        package: Import package with the folders ``<provider>_ops``.
        vendor: ``nvidia``, ``amd``, a torch device type, or None for every device.
        providers: Provider name to the packages it needs, most preferred first.
    """

    name: str
    package: str
    vendor: str | None
    providers: Mapping[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        for name in (self.name, *self.providers):
            if not re.fullmatch(r"[\w-]+", name):
                raise ValueError(f"{name!r} cannot be part of an id; needs letters, digits, _ or -")
        for provider, packages in self.providers.items():
            _implementation.check_strings(f"providers[{provider!r}]", packages)
            for requirement in packages:
                _implementation.parse_requirement(requirement)


class _Hooks:
    @hookspec
    def hwfuse_backend(self) -> Backend:  # type: ignore[empty-body]
        """Return the plugin's backend.  Called once, when plugins are loaded."""


@dataclass(eq=False)
class Registry:
    """The loaded backends.

    `problems`: plugin name to what went wrong, for `doctor`.  `added`: op to implementations
    without a file, by id; tests put them there.
    """

    backends: dict[str, Backend] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    tracebacks: dict[str, str] = field(default_factory=dict)
    blocked: dict[str, str] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    _files: dict[str, dict[str, Implementation]] = field(default_factory=dict)
    added: dict[str, dict[str, Implementation]] = field(default_factory=dict)

    def ids(self) -> tuple[str, ...]:
        """Every id that a loaded backend can have, in the backends' own order."""
        return tuple(f"{b.name}/{p}" for b in self.backends.values() for p in b.providers)

    def extra_ids(self) -> tuple[str, ...]:
        """Ids added at run time, for any op."""
        return tuple({identifier for found in self.added.values() for identifier in found})

    def implementations(self, op: str) -> dict[str, Implementation]:
        """Return the implementations of one op by id, reading their files the first time."""
        if op not in self._files:
            found: dict[str, Implementation] = {}
            for backend in self.backends.values():
                found |= _read_backend(backend, op)
            self._files[op] = found
        return self._files[op] | self.added.get(op, {})

    def vendor_of(self, identifier: str) -> str | None:
        """Return the vendor of the id's backend; None if it serves all or is a stranger's."""
        for found in self.added.values():
            if identifier in found:
                return found[identifier].vendor
        name = identifier.partition("/")[0]
        # Ours are known even if blocked or broken: on AMD a blocked cuda is not missed.
        return self.backends[name].vendor if name in self.backends else VENDORS.get(name)

    def unusable(self, identifier: str) -> str | None:
        """Say why a well-formed id has no loaded backend, or return None."""
        name = identifier.partition("/")[0]
        if name in self.backends:
            return None
        if name in self.blocked:
            return f"backend {name} is blocked by {self.blocked[name]}"
        if name in self.problems:
            return f"backend {name} is broken: {self.problems[name]}"
        return f"backend {name} is not installed"


def load(block: Mapping[str, str], added: dict[str, dict[str, Implementation]]) -> Registry:
    """Load all plugins but the blocked ones.

    Args:
        block: plugin name to who blocked it.
        added: what tests add; registries share it, so it outlives a change of *block*.
    """
    registry = Registry(blocked=dict(block), added=added)
    for entry in _entry_points():
        if entry.name in block:
            continue
        try:
            _load_one(registry, entry)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a stranger's code: kept for doctor
            registry.problems[entry.name] = f"{type(error).__name__}: {error}"
            registry.tracebacks[entry.name] = traceback.format_exc()
    return registry


def _entry_points() -> Iterable[importlib.metadata.EntryPoint]:
    unique = {(e.name, e.value): e for e in importlib.metadata.entry_points(group="hwfuse")}
    return [unique[key] for key in sorted(unique)]


def _load_one(registry: Registry, entry: importlib.metadata.EntryPoint) -> None:
    # A manager of its own: registration is not atomic, and a half-registered plugin would
    # make check_pending fail for every plugin after it.
    manager = pluggy.PluginManager("hwfuse")
    manager.add_hookspecs(_Hooks)
    manager.register(entry.load(), entry.name)
    manager.check_pending()
    answers = manager.hook.hwfuse_backend()
    if len(answers) != 1 or not isinstance(answers[0], Backend):
        raise TypeError(f"hwfuse_backend() of {entry.value} gave {answers!r}, needs one Backend")
    backend = answers[0]
    if backend.name != entry.name:
        raise ValueError(f"entry point {entry.name!r} gave a backend called {backend.name!r}")
    if importlib.util.find_spec(backend.package) is None:
        raise ModuleNotFoundError(f"its package {backend.package!r} cannot be imported")
    if backend.name in registry.backends:
        raise ValueError(f"two plugins are called {entry.name!r}: {entry.value} came second")
    registry.backends[backend.name] = backend
    distribution = entry.dist
    source = f"{distribution.name} {distribution.version}" if distribution else entry.value
    registry.sources[backend.name] = source


def _read_backend(backend: Backend, op: str) -> dict[str, Implementation]:
    found: dict[str, Implementation] = {}
    package = importlib.util.find_spec(backend.package)
    folders = list(package.submodule_search_locations or ()) if package else []
    for provider, packages in backend.providers.items():
        for folder in folders:
            path = Path(folder, f"{provider}_ops", f"{op}.py")
            if path.is_file():
                found[f"{backend.name}/{provider}"] = _implementation.InFile(
                    path, _spec.load(op), packages,
                    id=f"{backend.name}/{provider}", vendor=backend.vendor,
                    module=f"{backend.package}.{provider}_ops.{op}",
                )  # fmt: skip
    return found

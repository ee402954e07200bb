"""Say what is installed here, what works, what does not, and what would repair it.

Always prints: each look is guarded, and what fails becomes a line of the answer.  The exit code is
1 if a plugin or the configuration is broken; something that is only absent is no failure.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import hwfuse
from hwfuse import _compilers, _device, _plugins, _spec, _state
from hwfuse._cli._output import emit, heading, say, table
from hwfuse._implementation import Implementation
from hwfuse._packages import installed, missing

_PACKAGES = ("torch", "triton", "pluggy", "PyYAML", "transformers", "rich")
_FIRST_CALL = {
    "cpp": "compiles in seconds",
    "triton": "compiles in seconds",
    "aiter": "may compile for minutes",
}
_COMMANDS = {
    "amd-aiter": "pip install --pre amd-aiter",
    "aiter": "pip install git+https://github.com/ROCm/aiter",  # for what no release has
    "rocm": "install a newer ROCm, and a torch that is built for it",
    "deep_gemm": "pip install git+https://github.com/deepseek-ai/DeepGEMM",
    _compilers.NAME: _compilers.INSTALL,
}


def arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:  # noqa: ARG001
    """Declare the options."""
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(options: argparse.Namespace) -> int:
    """Look, print, and tell by the exit code whether something is broken."""
    data = examine()
    if options.json:
        emit(data)
    else:
        _show(data)
        if options.traceback:
            for text in _guarded(lambda: _state.registry().tracebacks, {}).values():
                say(text)
    return 1 if data["broken"] else 0


def examine() -> dict[str, Any]:
    """Return all that doctor knows, as plain JSON values."""
    broken: list[str] = []
    try:
        registry = _state.registry()
        found = [one for op in _spec.names() for one in registry.implementations(op).values()]
    except Exception as error:  # noqa: BLE001 - a broken setting must not keep doctor from printing
        registry, found = _plugins.Registry(), []
        broken.append(f"{type(error).__name__}: {error}")
    devices = _guarded(lambda: list(_devices()), [])
    broken += [f"plugin {name}: {text}; HWFUSE_BLOCK={name} leaves it out"
               for name, text in registry.problems.items()]  # fmt: skip
    broken += [f"{one.id} for {one.op}: {one.problem}" for one in found if one.problem]
    return {
        "versions": {
            "hwfuse": f"{hwfuse.__version__} in {Path(hwfuse.__file__).parent}",
            "python": f"{platform.python_version()} at {sys.executable}",
            "platform": platform.platform(),
            **{name: _guarded(partial(_version, name), "") for name in _PACKAGES},
            "CUDA C++": _guarded(_cuda_compilers, ""),
            "its cache": _guarded(_cache, ""),
        },
        "devices": devices,
        "settings": {k: v for k, v in os.environ.items() if k.startswith("HWFUSE_")},
        "plugins": _guarded(lambda: list(_plugin_rows(registry)), []),
        "implementations": _guarded(lambda: list(_states(found, devices)), []),
        "missing": _guarded(lambda: list(_missing(found)), []),
        "notes": [*_guarded(_aiter_notes, []), *_guarded(lambda: _launch_notes(registry), [])],
        "broken": broken,
    }


def _guarded(look: Callable[[], Any], empty: Any) -> Any:
    """Return what *look* returns; a failure in the form of *empty*."""
    try:
        return look()
    except Exception as error:  # noqa: BLE001 - whatever happens is part of the answer
        text = f"failed: {type(error).__name__}: {error}"
        return [{"failed": text}] if isinstance(empty, list) else text


def _version(name: str) -> str:
    if name == "torch":
        build = torch.version.hip and f"ROCm {torch.version.hip}"
        build = build or (torch.version.cuda and f"CUDA {torch.version.cuda}") or "CPU only"
        return f"{torch.__version__} ({build})"
    return installed(name) or "not installed"


def _cuda_compilers() -> str:
    found = "; then ".join(map(str, _compilers.compilers()))
    return found or "no compiler: neither nvcc nor NVRTC was found"


def _cache() -> str:
    folder = _compilers.cache_folder()
    sizes = [path.stat().st_size for path in folder.glob("*.cubin")]
    return f"{len(sizes)} compiled kernels, {sum(sizes) / 1e6:.1f} MB in {folder}"


def _devices() -> Iterator[dict[str, str]]:
    yield {
        "device": "cpu",
        "target": "cpu",
        "vendor": "cpu",
        "name": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return
    for index in range(torch.accelerator.device_count()):
        device = torch.device(accelerator.type, index)
        target = _device.target_of(device)
        name = torch.cuda.get_device_name(index) if device.type == "cuda" else device.type
        yield {
            "device": str(device),
            "target": str(target),
            "vendor": target.vendor,
            "name": name,
        }


def _plugin_rows(registry: _plugins.Registry) -> Iterator[dict[str, Any]]:
    for name, backend in registry.backends.items():
        package = importlib.util.find_spec(backend.package)
        folders = list(package.submodule_search_locations or ()) if package else []
        yield {
            "plugin": name,
            "state": "loaded",
            "from": registry.sources[name],
            "folder": folders[0] if folders else "",
        }
    for name in registry.problems:
        yield {"plugin": name, "state": "broken", "from": "", "folder": ""}
    for name, origin in registry.blocked.items():
        yield {"plugin": name, "state": f"blocked by {origin}", "from": "", "folder": ""}


def _states(
    found: Sequence[Implementation], devices: Sequence[dict[str, str]]
) -> Iterator[dict[str, Any]]:
    """Say for each id whether it can run on this machine."""
    vendors = {device.get("vendor") for device in devices}
    for identifier in dict.fromkeys(one.id for one in found):
        group = [one for one in found if one.id == identifier]
        lacks = dict.fromkeys(p for one in group for p in one.requires.packages if missing(p))
        state = "ready"
        if group[0].vendor not in (None, *vendors):
            state = f"no {group[0].vendor} device here"
        elif lacks:
            state = f"needs {', '.join(lacks)}"
        elif group[0].provider in _FIRST_CALL:
            state = f"ready; a first call {_FIRST_CALL[group[0].provider]}: hwfuse warmup"
        yield {"id": identifier, "ops": len(group), "state": state}


def _missing(found: Sequence[Implementation]) -> Iterator[dict[str, Any]]:
    """Say which packages are missing, for what, and which command installs them."""
    for requirement in dict.fromkeys(p for one in found for p in one.requires.packages):
        why = missing(requirement)
        users = dict.fromkeys(one.id for one in found if requirement in one.requires.packages)
        if why:
            yield {"why": why, "for": list(users), "command": _command(requirement)}


def _command(requirement: str) -> str:
    name = requirement.partition(">=")[0]
    if name == "triton" and (torch.version.cuda or torch.version.hip):
        return "reinstall torch for this accelerator: it brings the triton that fits it"
    package = name.partition(".")[0]  # of a module such as aiter.ops.new
    return _COMMANDS.get(name) or _COMMANDS.get(package, f"pip install '{requirement}'")


def _aiter_notes() -> list[dict[str, str]]:
    """Warn of the distribution ``aiter``: PyPI's is a library of async iterators, not AMD's."""
    try:
        found = version("aiter")
    except PackageNotFoundError:
        return []
    spec = importlib.util.find_spec("aiter")
    folders = spec.submodule_search_locations if spec else None
    if any(Path(folder, "ops").is_dir() for folder in folders or ()) and not installed("amd-aiter"):
        text = f"aiter {found} looks like AMD's, under its old name; hwfuse asks for amd-aiter"
    else:
        text = f"aiter {found} is PyPI's library of async iterators, not AMD's; uninstall it"
    command = f"pip uninstall aiter && {_COMMANDS['amd-aiter']}"
    return [{"note": text, "command": command}]


def _launch_notes(registry: _plugins.Registry) -> list[dict[str, str]]:
    """Ask the plugins that launch kernels of their own which way they do."""
    notes: list[str] = []
    for backend in registry.backends.values():
        look = getattr(importlib.import_module(backend.package), "launch_notes", None)
        notes += look() if look else []
    return [{"note": text, "command": ""} for text in dict.fromkeys(notes)]


def _show(data: dict[str, Any]) -> None:
    table(("versions", ""), list(data["versions"].items()))
    _part("Devices", data["devices"], ("device", "target", "name"))
    if data["settings"]:
        heading("Settings (all of them: hwfuse config)")
        table(("variable", "value"), list(data["settings"].items()))
    _part("Plugins", data["plugins"], ("plugin", "state", "from", "folder"))
    _part("Implementations", data["implementations"], ("id", "ops", "state"))
    _part("Missing here", data["missing"], ("why", "for", "command"))
    _part("Notes", data["notes"], ("note", "command"))
    heading("Broken" if data["broken"] else "Nothing is broken.")
    for text in data["broken"]:
        say(f"  {text}")


def _part(title: str, items: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    if not items:
        return
    heading(title)
    for item in items:
        if "failed" in item:
            say(f"  {item['failed']}")
    good = [item for item in items if "failed" not in item]
    rows = [[_text(item[column]) for column in columns] for item in good]
    if rows:
        table(columns, rows)


def _text(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)

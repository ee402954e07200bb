"""``hwfuse doctor``: it always prints."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from hwfuse import _plugins, _state
from hwfuse._cli import doctor
from hwfuse._implementation import Implementation, Requires


class Broken:
    """An entry point whose plugin cannot be imported."""

    name, value, dist = "acme", "hwfuse_acme", None

    def load(self):
        """Fail as a plugin with a missing library does."""
        raise ImportError("libacme.so: cannot open shared object file")


@pytest.fixture
def broken_plugin(monkeypatch):
    """One plugin more, which cannot be loaded."""
    entries = list(_plugins._entry_points())
    monkeypatch.setattr(_plugins, "_entry_points", lambda: [*entries, Broken()])
    monkeypatch.setattr(_state, "_registries", {})
    _state.forget()
    yield
    monkeypatch.undo()
    _state.forget()


def test_doctor_prints_versions_devices_plugins(run):
    """Everything is well: exit code 0 and all parts."""
    result = run("doctor")
    assert result.code == 0
    assert f"  torch         {torch.__version__}" in result.out
    lines = [line.split() for line in result.out.splitlines()]
    assert ["reference", "loaded", "hwfuse"] in [line[:3] for line in lines]
    assert ["cpu", "cpu"] in [line[:2] for line in lines]
    assert "\nNothing is broken.\n" in result.out


def test_doctor_broken_plugin_is_named_and_the_rest_shown(run, broken_plugin):
    """A broken plugin: exit code 1, its error, the setting that leaves it out; the rest works."""
    result = run("doctor")
    assert result.code == 1
    assert (
        "  plugin acme: ImportError: libacme.so: cannot open shared object file; "
        "HWFUSE_BLOCK=acme leaves it out\n"
    ) in result.out
    assert "reference/torch" in result.out


def test_doctor_broken_plugin_with_traceback_shows_where(run, broken_plugin):
    """``--traceback`` adds the plugin's own traceback."""
    assert "in load\n" in run("doctor", "--traceback").out


def test_doctor_blocked_plugin_says_by_whom(run, settings):
    """A blocked plugin is a setting, not a failure."""
    settings(HWFUSE_BLOCK="rocm")
    result = run("doctor")
    assert result.code == 0
    assert "rocm       blocked by HWFUSE_BLOCK" in result.out


def test_doctor_broken_setting_still_prints(run, settings):
    """With a configuration that cannot be read it prints what it can, and exits with 1."""
    settings(HWFUSE_CONFIG="/nowhere.yaml")
    result = run("doctor", "--json")
    data = json.loads(result.out)
    assert result.code == 1
    assert data["versions"]["torch"].startswith(torch.__version__)
    assert data["broken"][0].startswith("ConfigError: /nowhere.yaml: cannot be read: ")


def test_doctor_failing_probe_becomes_a_value(run, monkeypatch):
    """A driver that fails is a line of the answer, not the end of it."""

    def fail():
        raise RuntimeError("driver too old")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", fail)
    result = run("doctor")
    assert "  failed: RuntimeError: driver too old\n" in result.out
    assert "Plugins" in result.out


def test_doctor_missing_package_has_its_command():
    """For what is missing it says why, for which implementations, and the command."""
    needs = Requires(packages=("deep_gemm",))
    one = Implementation("cuda/deepgemm", "fp8_blockscale_gemm", "nvidia", "", None, needs)
    assert list(doctor._missing([one])) == [
        {
            "why": "needs deep_gemm; deep_gemm is not installed",
            "for": ["cuda/deepgemm"],
            "command": "pip install git+https://github.com/deepseek-ai/DeepGEMM",
        }
    ]


def test_doctor_implementation_states():
    """Ready, without its device, or without its package."""

    def one(identifier, vendor, *packages):
        needs = Requires(packages=packages)
        return Implementation(identifier, "fused_qkvzba", vendor, "", None, needs)

    found = [one("a/torch", None), one("b/torch", "amd"), one("c/torch", "nvidia", "no-such>=1")]
    states = doctor._states(found, [{"vendor": "cpu"}, {"vendor": "nvidia"}])
    assert [state["state"] for state in states] == [
        "ready",
        "no amd device here",
        "needs no-such>=1",
    ]


@pytest.mark.parametrize(
    ("has_ops", "text"),
    [
        (False, "aiter 0.13 is PyPI's library of async iterators, not AMD's; uninstall it"),
        (True, "aiter 0.13 looks like AMD's, under its old name; hwfuse asks for amd-aiter"),
    ],
)
def test_doctor_other_aiter_is_told_apart(monkeypatch, tmp_path, has_ops, text):
    """A distribution called aiter is not AMD's unless it has AMD's folders."""
    if has_ops:
        (tmp_path / "ops").mkdir()
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(doctor, "version", lambda _name: "0.13")
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda _name: found)
    (note,) = doctor._aiter_notes()
    command = "pip uninstall aiter && pip install --pre amd-aiter"
    assert note == {"note": text, "command": command}


def test_doctor_without_aiter_has_no_note():
    """Nothing installed, nothing to say."""
    assert doctor._aiter_notes() == []


def test_doctor_tells_what_plugins_say_of_their_launches(monkeypatch):
    """Once each: two backends may share what launches."""
    import hwfuse_cuda
    import hwfuse_rocm

    for plugin in (hwfuse_cuda, hwfuse_rocm):
        monkeypatch.setattr(plugin, "launch_notes", lambda: ["repeated calls are replayed in C"])
    notes = doctor._launch_notes(doctor._state.registry())
    assert notes == [{"note": "repeated calls are replayed in C", "command": ""}]


def test_doctor_without_a_gpu_says_nothing_of_launches(monkeypatch):
    """There are none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor._launch_notes(doctor._state.registry()) == []

"""Plugins as installed distributions: good, broken, blocked; one never stops the others."""

from __future__ import annotations

import sys

import pytest
import torch

import hwfuse
from hwfuse import _state
from hwfuse.testing import implementation

QUANT = hwfuse.op("fp8_group_quant")
X = torch.zeros(2, 128)
OURS = {"cuda", "reference", "rocm"}


def backend(name, **changes):
    """Return the source of a plugin's package."""
    values = {"name": name, "package": f"hwfuse_{name}", "vendor": None, "providers": {"fast": ()}}
    arguments = ", ".join(f"{k}={v!r}" for k, v in {**values, **changes}.items())
    return f"""\
import hwfuse

@hwfuse.hookimpl
def hwfuse_backend():
    return hwfuse.Backend({arguments})
"""


FAST = """\
from torch import Tensor
import torch
from hwfuse.ops import fp8_group_quant as spec

REQUIRES = {"facts": ("m <= 64",)}

def fp8_group_quant(
    x: Tensor, *, group_size: int = 128, scale_layout: str = "row",
    scale_format: str = "fp32", dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    q, scale = spec.outputs(x, group_size=group_size, dtype=dtype)
    return q.fill_(3), scale.fill_(5)
"""


def install_good(plugins, name="acme"):
    """Install a plugin that works."""
    files = {"fast_ops/__init__.py": "", "fast_ops/fp8_group_quant.py": FAST}
    plugins.install(name, backend(name), files)


def test_good_plugin_takes_part_and_its_kernels_are_imported_only_to_run(plugins):
    """An outside backend is found by its entry point, read as data, and runs."""
    install_good(plugins)
    registry = _state.registry()
    assert set(registry.backends) == {*OURS, "acme"}
    assert registry.problems == {}
    assert registry.sources["acme"] == "dist-acme 1.0"
    assert hwfuse.explain("fp8_group_quant", X).chosen == "acme/fast"
    assert "hwfuse_acme.fast_ops.fp8_group_quant" not in sys.modules
    assert QUANT(X)[1].unique().tolist() == [5.0]
    assert "hwfuse_acme.fast_ops.fp8_group_quant" in sys.modules
    assert hwfuse.explain("fp8_group_quant", torch.zeros(65, 128)).chosen == "reference/torch"


BROKEN = {
    "raises": ("import libmissing", "ModuleNotFoundError: No module named 'libmissing'"),
    "exits": ("raise SystemExit(3)", "SystemExit: 3"),
    "no_syntax": ("def", "SyntaxError: invalid syntax"),
    "hook_raises": (
        backend("acme").replace("return hwfuse.Backend", "raise OSError('no driver')  #"),
        "OSError: no driver",
    ),
    "misspelt_hook": (
        backend("acme").replace("def hwfuse_backend", "def hwfuse_backends"),
        "PluginValidationError: unknown hook 'hwfuse_backends' in plugin",
    ),
    "wrong_argument": (
        backend("acme").replace("hwfuse_backend()", "hwfuse_backend(version)"),
        "PluginValidationError: Plugin 'acme' for hook 'hwfuse_backend'",
    ),
    "no_hook": ("", "TypeError: hwfuse_backend() of hwfuse_acme gave [], needs one Backend"),
    "no_backend": (
        backend("acme").replace("return hwfuse.Backend", "return dict"),
        "TypeError: hwfuse_backend() of hwfuse_acme gave [{'name': 'acme'",
    ),
    "other_name": (
        backend("other"),
        "ValueError: entry point 'acme' gave a backend called 'other'",
    ),
    "bad_name": (backend("a/b"), "ValueError: 'a/b' cannot be part of an id; needs letters, "),
    "bad_provider": (
        backend("acme", providers={"my fast": ()}),
        "ValueError: 'my fast' cannot be part of an id; needs letters, ",
    ),
    "one_string": (
        backend("acme", providers={"fast": "triton>=3.6"}),
        "ValueError: providers['fast'] is 'triton>=3.6', needs a tuple of strings",
    ),
    "bad_requirement": (
        backend("acme", providers={"fast": ("triton==3.6",)}),
        "ValueError: 'triton==3.6' is not a requirement; write name or name>=1.2",
    ),
    "no_package": (
        backend("acme", package="hwfuse_acme_kernels"),
        "ModuleNotFoundError: its package 'hwfuse_acme_kernels' cannot be imported",
    ),
    "no_parent_package": (
        backend("acme", package="acme_none.kernels"),
        "ModuleNotFoundError: No module named 'acme_none'",
    ),
}


@pytest.mark.parametrize(("source", "problem"), BROKEN.values(), ids=BROKEN)
def test_broken_plugin_is_named_and_leaves_the_others_working(source, problem, plugins):
    """Every failure is caught, named and kept; ids of it are a reason, not an error."""
    install_good(plugins, "zulu")  # sorted after the broken one
    plugins.install("acme", source)
    registry = _state.registry()
    assert set(registry.backends) == {*OURS, "zulu"}
    assert set(registry.problems) == {"acme"}
    assert registry.problems["acme"].startswith(problem)
    assert "Traceback" in registry.tracebacks["acme"]
    assert QUANT(X)[1].unique().tolist() == [5.0]
    with pytest.raises(hwfuse.PinnedUnavailable) as error:
        QUANT.using("acme/fast")(X)
    reason = error.value.decision.rejected["acme/fast"][0]
    assert reason.startswith("backend acme is broken: " + problem)


def test_two_plugins_of_one_name_the_first_stays_and_the_second_is_named(plugins):
    """Sorted by name and module, so it is always the same one."""
    install_good(plugins)
    source = backend("acme", package="hwfuse_acme")
    plugins.install("acme", source, package="hwfuse_acme_2", distribution="dist-two")
    registry = _state.registry()
    assert registry.sources["acme"] == "dist-acme 1.0"
    text = "ValueError: two plugins are called 'acme': hwfuse_acme_2 came second"
    assert registry.problems == {"acme": text}
    assert hwfuse.explain("fp8_group_quant", X).chosen == "acme/fast"


def test_one_distribution_found_twice_is_no_problem(plugins):
    """An editable install may leave a second copy of its metadata."""
    install_good(plugins)
    plugins.install("acme", backend("acme"), distribution="dist-copy")
    assert _state.registry().problems == {}


@pytest.mark.parametrize("how", ["variable", "configure", "file"])
def test_blocked_plugin_is_never_imported_and_the_reason_says_by_whom(
    how, plugins, monkeypatch, tmp_path
):
    """The block list applies before the entry point is loaded."""
    plugins.install("acme", "raise AssertionError('imported')")
    install_good(plugins, "zulu")
    origin = {"variable": "HWFUSE_BLOCK", "configure": "hwfuse.configure"}.get(how)
    if how == "variable":
        monkeypatch.setenv("HWFUSE_BLOCK", "acme, other")
        hwfuse.configure()
    elif how == "configure":
        hwfuse.configure({"block": ["acme"]})
    else:
        (tmp_path / "a.yaml").write_text("version: 1\nblock: [acme]\n")
        hwfuse.configure(tmp_path / "a.yaml")
        origin = f"{tmp_path / 'a.yaml'}:2"
    registry = _state.registry()
    assert (registry.problems, registry.blocked["acme"]) == ({}, origin)
    assert "hwfuse_acme" not in sys.modules
    decision = hwfuse.explain("fp8_group_quant", X)
    assert decision.chosen == "zulu/fast"
    with hwfuse.using(fp8_group_quant=["acme/fast", "zulu/fast"]):
        reasons = hwfuse.explain("fp8_group_quant", X).rejected["acme/fast"]
    assert reasons == (f"backend acme is blocked by {origin}",)


def test_unblocked_plugin_is_back_at_once(plugins):
    """Blocking is a setting like any other."""
    install_good(plugins)
    QUANT(X)
    hwfuse.configure({"block": ["acme"]})
    assert QUANT(X)[1].unique().tolist() != [5.0]
    hwfuse.configure(None)
    assert QUANT(X)[1].unique().tolist() == [5.0]


def test_hook_is_called_once_however_often_the_policy_changes(plugins):
    """Hooks are cold: one load per set of blocked plugins."""
    source = "calls = []\n" + backend("acme").replace(
        "    return", "    calls.append(1)\n    return"
    )
    plugins.install("acme", source)
    for _ in range(3):
        hwfuse.configure({"on_miss": "silent"})
        QUANT(X)
    assert sys.modules["hwfuse_acme"].calls == [1]


def test_added_implementation_outlives_a_change_of_the_block_list(fakes):
    """What was added at run time is not a plugin's."""
    fakes.add("acme/fast")
    hwfuse.configure({"block": ["rocm"]})
    QUANT(X)
    assert fakes.ran == ["acme/fast"]


def test_added_implementation_of_a_taken_id_is_refused():
    """Two of one id would make a pin ambiguous."""
    taken = implementation("fp8_group_quant", "reference/torch", lambda *_: None)
    with pytest.raises(ValueError, match=r"^reference/torch already implements fp8_group_quant$"):
        taken.__enter__()

"""Implementation files: read as data, checked against the spec, imported only to run."""

from __future__ import annotations

import sys

import pytest
import torch

import hwfuse
from hwfuse import _implementation, _packages, _spec, _state

QUANT = hwfuse.op("fp8_group_quant")
X = torch.zeros(2, 128)
INIT = """\
import hwfuse

@hwfuse.hookimpl
def hwfuse_backend():
    providers = {"wrong": (), "right": ()}
    return hwfuse.Backend("acme", "hwfuse_acme", None, providers)
"""
SIGNATURE = """\
def fp8_group_quant(
    x: Tensor,
    *,
    group_size: int = 128,
    scale_layout: str = "row",
    scale_format: str = "fp32",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
"""
HEAD = "import torch\nfrom torch import Tensor\n"
BODY = "    return x, x\n"
SHOWN = (
    "fp8_group_quant(x: Tensor, *, group_size: int=128, scale_layout: str='row', "
    "scale_format: str='fp32', dtype: dtype | None=None) -> tuple[Tensor, Tensor]"
)


def source(requires="REQUIRES = {}\n", signature=SIGNATURE):
    """Return the text of an implementation file."""
    return HEAD + requires + signature + BODY


WRONG = {
    "unknown_key": (
        source("REQUIRES = {'archs': ('sm90',)}\n"),
        "REQUIRES has no key 'archs' (did you mean 'arch'?)",
    ),
    "no_literal": (
        source("REQUIRES = {'arch': ARCHES}\n"),
        "REQUIRES is \"{'arch': ARCHES}\", needs a literal dict",
    ),
    "unhashable": (source("REQUIRES = {[]: 1}\n"), "REQUIRES is '{[]: 1}', needs a literal dict"),
    "no_dict": (source("REQUIRES = ()\n"), "REQUIRES is (), needs a literal dict"),
    "absent": (source(""), "no REQUIRES = {...}"),
    "one_string": (
        source("REQUIRES = {'facts': 'm <= 64'}\n"),
        "REQUIRES['facts'] is 'm <= 64', needs a tuple of strings",
    ),
    "no_strings": (
        source("REQUIRES = {'arch': (90,)}\n"),
        "REQUIRES['arch'] is (90,), needs a tuple of strings",
    ),
    "bad_arch": (
        source("REQUIRES = {'arch': ('sm_90',)}\n"),
        "'sm_90' is not an arch; write sm90 or gfx942",
    ),
    "bad_trait": (
        source("REQUIRES = {'differentiable': 'no'}\n"),
        "REQUIRES['differentiable'] is 'no', needs a bool",
    ),
    "bad_requirement": (
        source("REQUIRES = {'packages': ('triton~=3.6',)}\n"),
        "'triton~=3.6' is not a requirement; write name or name>=1.2",
    ),
    "bad_fact": (
        source("REQUIRES = {'facts': ('m <= ',)}\n"),
        "'m <= ' is not a fact: invalid syntax",
    ),
    "unknown_name": (
        source("REQUIRES = {'facts': ('num_rows <= 64',)}\n"),
        "'num_rows <= 64': unknown name 'num_rows' (did you mean 'num_groups'?)",
    ),
    "bad_copies": (
        source("REQUIRES = {}\nCOPIES = ['x']\n"),
        "COPIES is ['x'], needs a literal dict",
    ),
    "no_function": (HEAD + "REQUIRES = {}\n", "no function fp8_group_quant"),
    "default": (
        source(signature=SIGNATURE.replace("128", "64")),
        f"signatures differ\n  spec: {SHOWN}\n  file: {SHOWN.replace('128', '64')}",
    ),
    "kind": (
        source(signature=SIGNATURE.replace("    *,\n", "")),
        f"signatures differ\n  spec: {SHOWN}\n  file: {SHOWN.replace('*, ', '')}",
    ),
    "name": (
        source(signature=SIGNATURE.replace("x: T", "inp: T")),
        f"signatures differ\n  spec: {SHOWN}\n  file: {SHOWN.replace('x: T', 'inp: T')}",
    ),
    "annotation": (
        source(signature=SIGNATURE.replace("int", "float")),
        f"signatures differ\n  spec: {SHOWN}\n  file: {SHOWN.replace('int', 'float')}",
    ),
    "no_syntax": ("REQUIRES = {\n", "'{' was never closed (fp8_group_quant.py, line 1)"),
    "no_text": ("REQUIRES = {}\0", "source code string cannot contain null bytes"),
}


def install(plugins, wrong, right=None):
    """Install a plugin with a wrong implementation before a right one."""
    files = {
        "wrong_ops/__init__.py": "",
        "right_ops/__init__.py": "",
        "wrong_ops/fp8_group_quant.py": wrong,
        "right_ops/fp8_group_quant.py": right or source(),
    }
    plugins.install("acme", INIT, files)
    return plugins.folder / "hwfuse_acme" / "wrong_ops" / "fp8_group_quant.py"


@pytest.mark.parametrize(("text", "problem"), WRONG.values(), ids=WRONG)
def test_wrong_file_is_never_chosen_and_the_reason_says_why(text, problem, plugins):
    """A file that cannot be read as data is a reason; the next implementation runs."""
    path = install(plugins, text)
    decision = hwfuse.explain("fp8_group_quant", X)
    assert decision.chosen == "acme/right"
    assert decision.rejected["acme/wrong"] == (f"{path}: {problem}",)
    assert QUANT(X)[0] is X
    assert "hwfuse_acme.wrong_ops.fp8_group_quant" not in sys.modules
    with pytest.raises(hwfuse.PinnedUnavailable):
        QUANT.using("acme/wrong")(X)


def test_written_otherwise_the_signature_is_the_same(plugins):
    """`torch.Tensor` is `Tensor`, and a decorator does not matter."""
    signature = "@torch.no_grad()\n" + SIGNATURE.replace("Tensor", "torch.Tensor")
    install(plugins, source("REQUIRES: dict = {}\n", signature))
    assert hwfuse.explain("fp8_group_quant", X).chosen == "acme/wrong"


def test_declared_record_holds_what_the_file_says(plugins):
    """Every key of REQUIRES is read, and the provider's packages are added."""
    requires = {
        "arch": ("sm90", "gfx942"),
        "packages": ("numpy>=1",),
        "facts": ("m <= 64",),
        "differentiable": True,
        "experimental": True,
        "deterministic": True,
        "batch_invariant": True,
    }
    install(plugins, source(f"REQUIRES = {requires}\nCOPIES = {{'x': 'row -> column'}}\n"))
    found = _state.registry().implementations("fp8_group_quant")["acme/wrong"]
    assert (found.backend, found.provider, found.problem) == ("acme", "wrong", None)
    assert [fact.source for fact in found.requires.facts] == ["m <= 64"]
    assert {k: getattr(found.requires, k) for k in requires if k != "facts"} == {
        k: v for k, v in requires.items() if k != "facts"
    }
    assert found.copies == {"x": "row -> column"}


def test_load_without_the_function_names_the_file(plugins):
    """What ast saw may be gone at run time."""
    path = install(plugins, source() + "del fp8_group_quant\n")
    with pytest.raises(hwfuse.BrokenImplementation, match=rf"^acme/wrong was chosen .* {path} "):
        QUANT(X)


def test_every_built_in_file_is_read_without_a_problem():
    """Ours are no exception."""
    for name in hwfuse.op_names():
        found = _state.registry().implementations(name)
        assert "reference/torch" in found
        assert {i: one.problem for i, one in found.items() if one.problem} == {}


@pytest.mark.parametrize(
    ("version", "requirement", "reason"),
    [
        ("3.6.0", "needed-lib", None),
        ("3.6.0", "needed-lib>=3.6", None),
        ("3.6", "needed-lib>=3.6.0", None),
        ("3.10.1", "needed-lib>=3.9", None),
        ("3.6.0+rocm7", "needed-lib>=3.6", None),
        ("3.7.0.dev20260101", "needed-lib>=3.6.9", None),
        ("3.5.9", "needed-lib>=3.6", "needs needed-lib>=3.6; found needed-lib 3.5.9"),
        ("3.6rc1", "needed-lib>=3.6.1", "needs needed-lib>=3.6.1; found needed-lib 3.6rc1"),
        ("1.0", "absent-lib>=3.6", "needs absent-lib>=3.6; absent-lib is not installed"),
    ],
)
def test_requirement_is_compared_with_what_is_installed(version, requirement, reason, plugins):
    """Missing or too old, in words."""
    plugins.distribution("needed-lib", version, {})
    plugins.reload()
    assert _packages.missing(requirement) == reason


def test_requirement_is_met_by_a_distribution_of_another_name(plugins):
    """ROCm's torch brings the module triton in pytorch-triton-rocm."""
    plugins.distribution("other-lib", "3.6.0", {"top_level.txt": "othermodule\n"})
    plugins._write("othermodule/__init__.py", "raise AssertionError('imported')")
    plugins._write("bare_module.py", "")
    plugins.reload()
    assert _packages.missing("othermodule>=3.6") is None
    text = "needs othermodule>=3.7; found othermodule 3.6.0"
    assert _packages.missing("othermodule>=3.7") == text
    assert _packages.missing("bare_module") is None


def test_pypi_aiter_is_not_amds():
    """The plain name on PyPI is somebody else's; ours asks for amd-aiter."""
    assert _state.registry().backends["rocm"].providers["aiter"] == ("amd-aiter",)


def test_parse_requires_takes_names_of_sizes_arguments_and_device():
    """The vocabulary of facts."""
    spec = _spec.load("fused_qkvzba")
    facts = ("r == 2", "qkvz.dtype == bfloat16", "head_k_dim == 128", "arch == sm90")
    assert len(_implementation.parse_requires({"facts": facts}, spec).facts) == 4

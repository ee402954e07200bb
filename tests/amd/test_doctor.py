"""What ``hwfuse doctor`` and the reasons of a decision say of AMD's packages."""

from __future__ import annotations

import sys

import pytest

from hwfuse import _packages
from hwfuse._cli import doctor

MODULE = "aiter.ops.triton._triton_kernels.gated_delta_rule.fused_qkvzba_split"


@pytest.mark.parametrize(
    ("requirement", "command"),
    [
        ("amd-aiter", "pip install --pre amd-aiter"),
        ("rocm>=7.2", "install a newer ROCm, and a torch that is built for it"),
        (MODULE, "pip install git+https://github.com/ROCm/aiter"),
    ],
)
def test_doctor_says_how_to_get_what_amd_calls_by_another_name(requirement, command):
    """None of them is installed by its own name: `pip install aiter` gets a stranger's package."""
    assert doctor._command(requirement) == command


def test_rocm_counts_as_a_package_of_torch_own_version(monkeypatch):
    """The ROCm that torch was built for; NVIDIA's and the CPU's torch have none."""
    monkeypatch.setattr("torch.version.hip", "7.1.25424-4179531dcd")
    _packages.missing.cache_clear()
    assert _packages.missing("rocm>=7.2") == "needs rocm>=7.2; found rocm 7.1.25424-4179531dcd"
    assert _packages.missing("rocm>=7.1") is None
    _packages.missing.cache_clear()


@pytest.mark.parametrize("name", ["pkg.ops.new", "pkg.ops", "pkg"])
def test_module_is_found_by_its_file_and_not_imported(name, tmp_path, monkeypatch):
    """Importing aiter takes seconds and needs ROCm; a look at the folder does not."""
    path = tmp_path / "pkg" / "ops" / "new.py"
    path.parent.mkdir(parents=True)
    (tmp_path / "pkg" / "__init__.py").write_text("raise RuntimeError('imported')")
    path.write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert _packages.installed(name) == "0"
    assert _packages.installed("pkg.ops.old") is None
    assert "pkg" not in sys.modules

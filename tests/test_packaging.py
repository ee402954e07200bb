"""What is installed, and what importing it costs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import hwfuse

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = [ROOT / p for p in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]]

IMPORT = """
import json, sys, time
import torch
before, start = set(sys.modules), time.process_time()
import hwfuse
seconds = time.process_time() - start
hwfuse.op("fused_qkvzba")
new = sorted(set(sys.modules) - before)
print(json.dumps([seconds, new, torch.cuda.is_initialized()]))
"""
HEAVY = (
    "torch._dynamo",
    "torch._inductor",
    "triton",
    "transformers",
    "aiter",
    "cutlass",
    "deep_gemm",
)


def import_hwfuse():
    """Import hwfuse after torch, in a new process: CPU seconds, new modules, is CUDA started."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", IMPORT]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel from this checkout."""
    from hatchling.builders.wheel import WheelBuilder

    folder = tmp_path_factory.mktemp("wheel")
    (path,) = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_wheel_top_level_is_the_five_packages_and_nothing_else(wheel):
    """No stray package (tests, backends, conf) is installed on anyone's machine."""
    top = {name.partition("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {f.name for f in FOLDERS}


def test_wheel_holds_every_file_of_the_packages(wheel):
    """Specs, implementations, tuned tables and py.typed are found by name, so all must be there."""
    files = {
        str(path.relative_to(folder.parent))
        for folder in FOLDERS
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    installed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert installed == files
    assert {f"{folder.name}/py.typed" for folder in FOLDERS} <= installed


def test_wheel_entry_points_name_the_three_backends(wheel):
    """The built-in backends load exactly as a stranger's does."""
    (name,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    text = wheel.read(name).decode()
    assert "[hwfuse]\ncuda = hwfuse_cuda\nreference = hwfuse_reference\nrocm = hwfuse_rocm" in text


def test_backends_folder_is_no_package():
    """`backends/__init__.py` would collide with every other project that has such a folder."""
    assert not [*ROOT.glob("backends/__init__.py"), *ROOT.glob("backends/*/__init__.py")]


def test_version_is_the_same_in_code_and_metadata():
    """The version is written twice, in pyproject.toml and in the code, and must agree."""
    assert hwfuse.__version__ == PROJECT["project"]["version"]


def test_import_loads_no_compiler_model_or_kernel_library():
    """`import hwfuse` and looking up an op load none of them and do not start CUDA."""
    _, modules, cuda_started = import_hwfuse()
    assert [name for name in modules if name.startswith((*HEAVY, "hwfuse.testing"))] == []
    assert not cuda_started


def test_import_takes_less_than_100_ms_over_torch():
    """The best of three, in CPU time: what else runs on the machine must not decide."""
    assert min(import_hwfuse()[0] for _ in range(3)) < 0.1


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_with_an_old_python_says_so(tmp_path):
    """A wrong Python gives a sentence with what was found and needed, not a traceback."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt", ".ci/setup_venv.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    old = tmp_path / "python3.8"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.8.18\nexit 1\n')
    old.chmod(0o755)
    command = ["make", f"PYTHON={old}", ".venv/ready"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode
    assert f"needs 3.11 or newer, with venv; {old} is Python 3.8.18" in result.stdout

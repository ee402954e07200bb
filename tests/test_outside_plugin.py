"""A stranger's backend: installed beside us, proved by our harness, without a line of ours."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "hwfuse-acme"
EXPLAIN = "import hwfuse; d = hwfuse.explain('fused_qkvzba', m=4); print(d.chosen, d.rejected)"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Install the example as its author would; return the folder and a way to run Python there."""
    source = shutil.copytree(EXAMPLE, tmp_path_factory.mktemp("source") / "hwfuse-acme")
    target, elsewhere = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("tests")
    shutil.move(source / "test_parity.py", elsewhere)
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-compile", "--target", target)
    subprocess.run([sys.executable, "-m", "pip", "install", *options, source], check=True)

    def python(*arguments, **variables):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HWFUSE_")}
        environment["PYTHONPATH"] = f"{target}{os.pathsep}{environment.get('PYTHONPATH', '')}"
        environment["PYTHONDONTWRITEBYTECODE"] = "1"  # a test below edits a file
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=elsewhere,
            env=environment | variables,
            capture_output=True,
            text=True,
            check=False,
        )

    return target, python


def parity(python):
    """Run its own test."""
    return python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-rA", "test_parity.py")


def test_example_is_about_26_lines_and_none_of_ours():
    """The cost of a backend from outside, which design.md promises."""
    files = [*EXAMPLE.rglob("*.toml"), *EXAMPLE.rglob("hwfuse_acme/**/*.py")]
    lines = [line for file in files for line in file.read_text().splitlines() if line.strip()]
    assert 20 < len(lines) <= 30


def test_install_adds_its_own_files_only(installed):
    """Nothing of hwfuse is written to or registered by hand: an entry point is enough."""
    target, _ = installed
    assert {path.name.partition("-")[0] for path in target.iterdir()} == {"hwfuse_acme"}


def test_example_passes_parity_by_one_import(installed):
    """The harness finds its implementation, gives it every dtype and breaks its fact."""
    result = parity(installed[1])
    assert result.returncode == 0, result.stdout
    for label in ("bfloat16-m=37-interleaved", "float32-m=0-interleaved", "rejections", "reached"):
        assert f"PASSED test_parity.py::test_parity[fused_qkvzba-acme/index-cpu-{label}]" in (
            result.stdout
        )


def test_broken_example_fails_parity(installed):
    """The proof is one: with b and a swapped it does not hold."""
    target, python = installed
    file = target / "hwfuse_acme" / "index_ops" / "fused_qkvzba.py"
    text = file.read_text()
    try:
        file.write_text(text.replace("b, a = torch", "a, b = torch"))
        result = parity(python)
    finally:
        file.write_text(text)
    assert result.returncode == 1
    assert "output b: every bit must arrive" in result.stdout


def test_example_runs_only_when_it_is_named(installed):
    """Experimental: to install it changes nothing; one line of policy chooses it."""
    python = installed[1]
    chosen, _, rejected = python("-c", EXPLAIN).stdout.partition(" ")
    assert chosen == "reference/torch"
    assert "experimental: runs only when an order or a pin names it" in rejected
    named = python("-c", EXPLAIN, HWFUSE_USE="fused_qkvzba=acme/index")
    assert named.stdout.startswith("acme/index ")
    blocked = python("-c", EXPLAIN, HWFUSE_BLOCK="acme")
    assert "acme" not in blocked.stdout

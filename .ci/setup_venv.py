"""Make `.venv` with what demo, test and check need; run by `make` with the outer Python.

A torch that the outer Python has is used, never replaced: the accelerator's vendor may have built
it.  pip's output goes to `.venv/pip.log`.  Safe to run again, also after an interruption.
"""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOG = VENV / "pip.log"
EXTRAS = ("transformers", "test", "lint")

# A second transformers for the model tests, put in front by PYTHONPATH.  It needs an older hub, and
# that one needs httpx; everything else it finds in .venv.
OLD_TRANSFORMERS = VENV / "transformers-5.17"
OLD_TRANSFORMERS_PINS = ("transformers==5.17.0", "huggingface_hub==1.33.0")
OLD_TRANSFORMERS_NEEDS = ("httpx==0.28.1",)

# Name to the least version that hwfuse works with, read from the imported module: on ROCm the
# distribution that brings `triton` has another name, and asking pip for triton adds a second one.
OUTER_LIBRARIES = {"torch": (2, 10), "triton": (3, 6), "numpy": (1, 26), "transformers": (5, 17)}


def main() -> None:
    """Make or update .venv."""
    torch = outer_version("torch")
    kept = {"torch"} if is_suitable("torch", torch) else set()
    if kept:
        print(f"python3 has torch {torch}: .venv uses it", flush=True)
        kept |= {n for n in OUTER_LIBRARIES if is_suitable(n, outer_version(n))}
    else:
        print("installing torch and the test set-up into .venv (minutes)", flush=True)
    make_venv(with_outer_packages=bool(kept))

    pins = [line for line in read_pins() if name_of(line) not in kept]
    constraints = VENV / "constraints.txt"
    constraints.write_text("\n".join(pins) + "\n")
    # torch alone and first: with a looser requirement beside it pip fetches gigabytes of CUDA.
    for name in ("torch", "triton"):
        pip(*(pin for pin in pins if name_of(pin) == name))
    wanted = [line for line in requirements() if name_of(line) not in kept | {"torch", "triton"}]
    pip("-c", str(constraints), *wanted, *OLD_TRANSFORMERS_NEEDS)
    pip("--no-deps", "--no-build-isolation", "-e", str(ROOT))
    install_old_transformers()


def outer_version(name: str) -> str | None:
    """Return the version of a module that the outer Python imports, or None."""
    # Another process: what it loads must not stay, and a broken library may not only raise.
    code = f"import {name}; print({name}.__version__)"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    return result.stdout.split()[-1] if result.returncode == 0 and result.stdout.split() else None


def is_suitable(name: str, version: str | None) -> bool:
    """Say whether *version* (None: absent) is new enough."""
    if version is None:
        return False
    numbers = [int(part) for part in version.split("+")[0].split(".")[:2]]
    return tuple(numbers) >= OUTER_LIBRARIES[name]


def make_venv(*, with_outer_packages: bool) -> None:
    """Make the venv, or keep the one that was made in the same way."""
    made_with = f"{VENV} {sys.executable} {sys.version} outer={with_outer_packages}"
    record = VENV / "made-with"
    if record.is_file() and record.read_text() == made_with:
        return
    options = ["--system-site-packages"] if with_outer_packages else []
    shutil.rmtree(VENV, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", *options, str(VENV)], check=True)
    if with_outer_packages and sys.prefix != sys.base_prefix:
        # The outer Python is a venv itself, and the option above gives the packages of *its* base.
        library = next((VENV / "lib").glob("python3*/site-packages"))
        (library / "outer.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    record.write_text(made_with)


def read_pins() -> list[str]:
    """Return the lines of constraints.txt that pin something."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def requirements() -> list[str]:
    """Return what pyproject.toml asks for: the base and `EXTRAS`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    return [*project["dependencies"], *(line for extra in EXTRAS for line in extras[extra])]


def name_of(requirement: str) -> str:
    """Return ``torch`` for ``torch>=2.10``."""
    for sign in "=<>!~[; ":
        requirement = requirement.partition(sign)[0]
    return requirement


def pip(*arguments: str) -> None:
    """Run pip install quietly; exit with the end of its log when it fails."""
    if not arguments:
        return
    command = [str(PYTHON), "-m", "pip", "--no-input", "install", *arguments]
    with LOG.open("a") as log:
        log.write(f"\n$ {' '.join(command)}\n")
        log.flush()
        result = subprocess.run(
            command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, check=False
        )
    if result.returncode:
        tail = LOG.read_text().splitlines()[-20:]
        sys.exit("\n".join([*tail, "", f"pip failed; all of its output is in {LOG}"]))


def install_old_transformers() -> None:
    """Install the second transformers, and prove that it is the one that gets imported."""
    version = OLD_TRANSFORMERS_PINS[0].partition("==")[2]
    if not (OLD_TRANSFORMERS / f"transformers-{version}.dist-info").is_dir():
        shutil.rmtree(OLD_TRANSFORMERS, ignore_errors=True)
        pip("--no-deps", "--target", str(OLD_TRANSFORMERS), *OLD_TRANSFORMERS_PINS)
    code = "import transformers; print(transformers.__version__)"
    environment = os.environ | {"PYTHONPATH": str(OLD_TRANSFORMERS)}
    command = [str(PYTHON), "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.stdout.strip() != version:
        found = result.stdout.strip() or result.stderr
        sys.exit(f"{OLD_TRANSFORMERS} should give transformers {version}, gives: {found}")


if __name__ == "__main__":
    main()

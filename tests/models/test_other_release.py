"""The tests of this folder with the other release of transformers.

They run with the one that is installed and, in a second process, with the one that `make` puts
beside it (`TRANSFORMERS_OTHER` names another folder).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

OTHER = Path(os.environ.get("TRANSFORMERS_OTHER", Path(sys.prefix) / "transformers-5.17"))
RUN = """
import sys, pytest
status = pytest.main([sys.argv[1], "-q", "-p", "no:cacheprovider", "-p", "no:xdist"])
found = sys.modules["transformers"].__file__
assert found.startswith(sys.argv[2]), found
sys.exit(status)
"""


def test_all_of_this_when_run_with_the_other_transformers_holds_too():
    """Rules go by text, so one rule serves both releases."""
    if os.environ.get("TRANSFORMERS_OTHER") == "":
        pytest.skip("this is the run with the other release")
    if not OTHER.is_dir():
        stop = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        stop(f"{OTHER} is missing: `make test` installs it")
    path = os.pathsep.join(filter(None, [str(OTHER), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [sys.executable, "-c", RUN, str(Path(__file__).parent), str(OTHER)],
        env=os.environ | {"PYTHONPATH": path, "TRANSFORMERS_OTHER": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr

"""The budget of the design: how much a newcomer must read to understand one call."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUDGET = 1200
LONGEST = 50
FILES = [*(ROOT / "hwfuse").rglob("*.py"), *(ROOT / "backends").rglob("*.py")]
CALL = """
import sys
import hwfuse
op = hwfuse.op("w4a8_moe_prep")
inputs = op.spec.make_inputs(m=2)
args, kwargs = op.spec.split(inputs)
op(*args, **kwargs)
print("\\n".join(m.__file__ for n, m in sys.modules.items() if n.partition(".")[0] == "hwfuse"))
"""


def docstring_lines(node):
    """Return how many lines the docstrings in a module, class or function take."""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    found = [n.body[0] for n in ast.walk(node) if isinstance(n, kinds) and ast.get_docstring(n)]
    return sum(doc.end_lineno - doc.lineno + 1 for doc in found)


def num_lines(path):
    """Return the lines of a file without docstrings."""
    text = path.read_text(encoding="utf-8")
    return len(text.splitlines()) - docstring_lines(ast.parse(text))


def is_kernel(node):
    """Tell whether a function is device code."""
    return any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)


def test_num_lines_counts_all_but_docstrings(tmp_path):
    """Comments and blank lines are read, so they count."""
    path = tmp_path / "a.py"
    path.write_text(
        '"""Doc."""\n\n# why\ndef f():\n    """Doc.\n\n    More.\n    """\n    return 1\n'
    )
    assert num_lines(path) == 4


@pytest.mark.xfail(strict=True, reason="over the budget: to be cut, see the message")
def test_modules_of_one_call_are_within_the_budget():
    """What `hwfuse.op(name)(…)` loads from hwfuse."""
    done = subprocess.run([sys.executable, "-c", CALL], capture_output=True, text=True, check=True)
    sizes = {path: num_lines(Path(path)) for path in done.stdout.split()}
    assert len(sizes) > 10
    text = "\n".join(f"{size:5} {path}" for path, size in sorted(sizes.items()))
    assert sum(sizes.values()) <= BUDGET, f"{sum(sizes.values())} lines:\n{text}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_function_is_long(path):
    """At most 50 lines without docstring, outside kernels."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_kernel(node):
            length = node.end_lineno - node.lineno + 1 - docstring_lines(node)
            assert length <= LONGEST, f"{node.name} has {length} lines"

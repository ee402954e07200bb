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
import sys, torch, hwfuse
qkvz, ba = torch.zeros(2, 12288), torch.zeros(2, 64)
hwfuse.op("fused_qkvzba")(qkvz, ba, head_k_dim=128, head_v_dim=128)
print("\\n".join(m.__file__ for n, m in sys.modules.items() if n.partition(".")[0] == "hwfuse"))
"""


def docstring_lines(node):
    """Return how many lines with text the docstrings in a module, class or function take."""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    found = [n.body[0] for n in ast.walk(node) if isinstance(n, kinds) and ast.get_docstring(n)]
    texts = [
        ast.get_docstring(n).splitlines()
        for n in ast.walk(node)
        if isinstance(n, kinds) and ast.get_docstring(n)
    ]
    blank = sum(1 for text in texts for line in text if not line)
    return sum(doc.end_lineno - doc.lineno + 1 for doc in found) - blank


def num_lines(path):
    """Return the lines of code of a file: no docstrings, comments or blank lines."""
    text = path.read_text(encoding="utf-8")
    lines = [line.strip() for line in text.splitlines()]
    code = sum(1 for line in lines if line and not line.startswith("#"))
    docstrings = docstring_lines(ast.parse(text))
    return code - docstrings


def is_kernel(node):
    """Tell whether a function is device code."""
    return any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)


def test_num_lines_counts_code(tmp_path):
    """A comment costs a reader nothing that it does not give back."""
    path = tmp_path / "a.py"
    path.write_text(
        '"""Doc."""\n\n# why\ndef f():\n    """Doc.\n\n    More.\n    """\n    return 1\n'
    )
    assert num_lines(path) == 2


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

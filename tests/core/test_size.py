"""The budget of the design: how much a newcomer must read to understand one call."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = 1200
LINES = 1560  # where it stands with comments and blank lines; it may only shrink
LONGEST = 50
FILES = [*(ROOT / "hwfuse").rglob("*.py"), *(ROOT / "backends").rglob("*.py")]
CALL = """
import sys, torch, hwfuse
qkvz, ba = torch.zeros(2, 12288), torch.zeros(2, 64)
hwfuse.op("fused_qkvzba")(qkvz, ba, head_k_dim=128, head_v_dim=128)
print("\\n".join(m.__file__ for n, m in sys.modules.items() if n.partition(".")[0] == "hwfuse"))
"""


def docstring_lines(node):
    """Return the numbers of the lines that docstrings in a module, class or function take."""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    found = [n.body[0] for n in ast.walk(node) if isinstance(n, kinds) and ast.get_docstring(n)]
    return {line for doc in found for line in range(doc.lineno, doc.end_lineno + 1)}


def num_lines(path):
    """Return (lines without docstrings, those of them that are neither blank nor a comment)."""
    text = path.read_text(encoding="utf-8")
    skipped = docstring_lines(ast.parse(text))
    lines = [line.strip() for i, line in enumerate(text.splitlines(), 1) if i not in skipped]
    return len(lines), sum(1 for line in lines if line and not line.startswith("#"))


def is_kernel(node):
    """Tell whether a function is device code."""
    return any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)


def test_num_lines_leaves_docstrings_out(tmp_path):
    """The second number also leaves out comments and blank lines."""
    path = tmp_path / "a.py"
    path.write_text(
        '"""Doc."""\n\n# why\ndef f():\n    """Doc.\n\n    More.\n    """\n    return 1\n'
    )
    assert num_lines(path) == (4, 2)


def test_modules_of_one_call_are_within_the_budget():
    """What `hwfuse.op(name)(…)` loads from hwfuse: 1,200 lines of code, and no more air around."""
    done = subprocess.run([sys.executable, "-c", CALL], capture_output=True, text=True, check=True)
    sizes = {path: num_lines(Path(path)) for path in done.stdout.split()}
    assert len(sizes) > 10
    text = "\n".join(f"{lines:5} {code:5} {path}" for path, (lines, code) in sorted(sizes.items()))
    total, code = (sum(column) for column in zip(*sizes.values(), strict=True))
    assert code <= CODE, f"{code} lines of code:\n{text}"
    assert total <= LINES, f"{total} lines with comments and blank ones:\n{text}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_function_is_long(path):
    """At most 50 lines without docstring, outside kernels."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_kernel(node):
            length = node.end_lineno - node.lineno + 1 - len(docstring_lines(node))
            assert length <= LONGEST, f"{node.name} has {length} lines"

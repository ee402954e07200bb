"""The table of what hwfuse calls in aiter, against AMD's sources where they are installed."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from hwfuse_rocm import _aiter


def written(folder, label, version):
    """Return the parameters that AMD's source gives a function, as text; None if it has none."""
    entry = _aiter.FUNCTIONS[label]
    module = entry.modules[0 if version == "head" else -1]
    path = Path(folder, *module.split(".")).with_suffix(".py")
    if not path.is_file():
        return None
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == entry.name:
            for argument in node.args.args:
                argument.annotation = None
            return ast.unparse(node.args)
    return None


def stated(label, version):
    """Return the parameters that the table gives a function in a version."""
    entry = _aiter.FUNCTIONS[label]
    if version == "0.1.7" and entry.is_newer:
        return None
    arguments = ast.parse(f"lambda {entry.parameters}: 0", mode="eval").body.args
    num_newer = len(entry.newer) if version == "0.1.7" else 0
    if num_newer:
        assert tuple(a.arg for a in arguments.args[-num_newer:]) == entry.newer
        del arguments.args[-num_newer:], arguments.defaults[-num_newer:]
    return ast.unparse(arguments)


@pytest.mark.parametrize("label", _aiter.FUNCTIONS)
def test_table_says_what_the_source_says(label, aiter_source):
    """Names, order and defaults; a change on AMD's side is found before it runs."""
    version, folder = aiter_source
    assert written(folder, label, version) == stated(label, version)


@pytest.mark.parametrize(
    "change",
    ["bias=None, splitK=None, dtype=dtypes.bf16", "bias=None, dtype=dtypes.fp16, splitK=None"],
)
def test_change_of_order_or_default_in_the_source_is_found(change, tmp_path):
    """The comparison can fail: AMD has moved a parameter before."""
    path = tmp_path / "aiter" / "ops" / "batched_gemm_op_bf16.py"
    path.parent.mkdir(parents=True)
    for parameters, is_same in (
        ("bias=None, dtype=dtypes.bf16, splitK=None", True),
        (change, False),
    ):
        path.write_text(f"def batched_gemm_bf16_CK(XQ, WQ, {parameters}): ...")
        found = written(tmp_path, "batched_gemm_bf16_CK", "head")
        assert (found == stated("batched_gemm_bf16_CK", "head")) == is_same


@pytest.mark.parametrize("label", _aiter.FUNCTIONS)
@pytest.mark.parametrize("version", ["0.1.7", "head"])
def test_stand_in_has_the_signatures_of_the_table(label, version, stand_in):
    """The stand-in is made from the table, not beside it."""
    entry = _aiter.FUNCTIONS[label]
    for name, module in stand_in.modules(version, "gfx950").items():
        if name in entry.modules and hasattr(module, entry.name):
            found = getattr(module, entry.name).__signature__
            names = [p.split("=")[0] for p in stated(label, version).split(", ")]
            assert list(found.parameters) == names
            return
    assert stated(label, version) is None


def test_missing_function_names_where_it_was_sought(installed):
    """An aiter without a function gives an error that says what is needed."""
    installed("0.1.7", "gfx942")
    with pytest.raises(Exception, match=r"no fused_qkvzba_split_reshape_cat_decode, needs"):
        _aiter.function("fused_qkvzba_split_reshape_cat_decode")


def test_stand_in_is_not_importable_outside_of_its_tests():
    """Nothing that is called aiter is put on the path of anyone."""
    assert not any(path.name == "aiter" for path in Path(__file__).parents[1].rglob("*"))

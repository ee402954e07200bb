"""``hwfuse ops``."""

from __future__ import annotations

import json
from pathlib import Path

import hwfuse
from hwfuse import _spec, testing


def test_ops_lists_every_op_with_its_reference(run):
    """Each op has a reference, on every device."""
    found = json.loads(run("ops", "--json").out)
    references = {one["op"] for one in found if one["id"] == "reference/torch"}
    assert references == set(_spec.names())


def test_ops_table_shows_what_an_implementation_needs(run):
    """The text names op, id, device and needs."""
    result = run("ops", "fused_qkvzba")
    assert result.code == 0
    header, first, *_ = result.out.splitlines()
    assert header.split() == ["op", "implementation", "runs", "on", "needs"]
    assert first.split() == ["fused_qkvzba", "reference/torch", "every", "device"]


def test_ops_markdown_is_op_by_implementation(run):
    """One row per op, one column per id."""
    result = run("ops", "--markdown", "--backend", "reference")
    lines = result.out.splitlines()
    assert lines[:2] == ["| op | reference/torch |", "|---|---|"]
    assert lines[2:] == [f"| `{op}` | every device |" for op in _spec.names()]


def test_ops_markdown_leaves_outside_backends_out(run):
    """The README's table does not depend on what else is installed; ``--backend`` asks for it."""
    reference = hwfuse.op("fused_qkvzba").using("reference/torch")
    with testing.implementation("fused_qkvzba", "acme/memory", reference):
        assert "acme/memory" in run("ops").out
        assert "acme/memory" not in run("ops", "--markdown").out


def test_readme_table_is_the_generated_one(run, tmp_path):
    """README.md holds what is generated; after a change: hwfuse ops --update README.md."""
    readme = Path(__file__).parents[2] / "README.md"
    copy = tmp_path / "README.md"
    copy.write_text(readme.read_text(encoding="utf-8"), encoding="utf-8")
    assert run("ops", "--update", str(copy)).code == 0
    assert copy.read_text(encoding="utf-8") == readme.read_text(encoding="utf-8")


def test_ops_update_without_marks_changes_nothing(run, tmp_path):
    """A file without the place for the table is an error that names the marks."""
    path = tmp_path / "README.md"
    path.write_text("# hwfuse\n")
    result = run("ops", "--update", str(path))
    assert (result.code, path.read_text()) == (2, "# hwfuse\n")
    assert "needed a file with the lines '<!-- ops table: hwfuse ops --markdown -->'" in result.err


def test_docs_page_is_the_generated_one(run, tmp_path):
    """docs/ops.md holds what the specs say; after a change: hwfuse ops --docs docs/ops.md."""
    committed = Path(__file__).parents[2] / "docs" / "ops.md"
    generated = tmp_path / "ops.md"
    assert run("ops", "--docs", str(generated)).code == 0
    assert committed.read_text(encoding="utf-8") == generated.read_text(encoding="utf-8")


def test_docs_page_says_all_that_an_op_declares(run, tmp_path):
    """Arguments, results, sizes, comparators and implementations; another op is a link."""
    path = tmp_path / "ops.md"
    assert run("ops", "--docs", str(path), "moe_permute_fp8_quant").code == 0
    text = path.read_text(encoding="utf-8")
    assert "\n## moe_permute_fp8_quant\n" in text
    assert "[`w4a8_moe_prep`](#w4a8_moe_prep)" in text
    spec = hwfuse.op("moe_permute_fp8_quant").spec
    for name in (*spec.parameters, *spec.compare):
        assert f"\n- `{name}`: " in text
    for word in (*spec.size_names, "reference/torch"):
        assert f"`{word}`" in text
    ((comparator, numbers),) = spec.compare.values()
    assert f"`{comparator}(" in text
    assert all(f"{name}={value}" in text for name, value in numbers.items())


def test_ops_unknown_backend_says_which_there_are(run):
    """A backend that is not loaded is usage."""
    result = run("ops", "--backend", "cude")
    assert result.code == 2
    assert "--backend: found 'cude', needed one of" in result.err
    assert "(did you mean 'cuda'?)" in result.err


def test_ops_unknown_op_is_usage(run):
    """An unknown op gets a suggestion."""
    result = run("ops", "fused_qkvz")
    assert (result.code, "did you mean 'fused_qkvzba'" in result.err) == (2, True)

"""``hwfuse config``."""

from __future__ import annotations

import json


def test_config_built_in_shows_the_order(run):
    """Without settings everything is built-in."""
    data = json.loads(run("config", "--json").out)
    assert data["on_miss"] == {"value": "warn", "origin": "built-in"}
    (order,) = data["orders"]
    assert (order["op"], order["origin"], order["ids"][-1]) == ("*", "built-in", "...")


def test_config_file_and_variable_show_where_each_was_set(run, settings, tmp_path):
    """Each value has its origin: file and line, or variable."""
    path = tmp_path / "h200.yaml"
    path.write_text(
        "version: 1\non_miss: error\nops:\n  fused_qkvzba:\n    order: [cuda/triton]\n"
        "    rules:\n      - when: [m <= 64]\n        order: [reference/torch]\n"
    )
    settings(HWFUSE_CONFIG=str(path), HWFUSE_USE="fp8_group_quant=reference/torch")
    result = run("config")
    assert result.code == 0
    lines = [" ".join(line.split()) for line in result.out.splitlines()]
    assert f"on_miss error {path}:2" in lines
    assert f"fused_qkvzba m <= 64 reference/torch {path}:8" in lines
    assert f"fused_qkvzba always cuda/triton {path}:5" in lines
    assert "fp8_group_quant always reference/torch (pinned) HWFUSE_USE" in lines


def test_config_overridden_value_is_left_out(run, settings, tmp_path):
    """Only what applies is shown: ``*`` of a higher layer hides an op of a lower one."""
    path = tmp_path / "h200.yaml"
    path.write_text("ops: {fused_qkvzba: cuda/triton}\n")
    settings(HWFUSE_CONFIG=str(path), HWFUSE_USE="*=reference/torch")
    orders = json.loads(run("config", "--json").out)["orders"]
    assert [(order["op"], order["origin"]) for order in orders] == [("*", "HWFUSE_USE")]


def test_config_wrong_setting_says_where(run, settings, tmp_path):
    """A wrong file is an error that names file and line."""
    path = tmp_path / "h200.yaml"
    path.write_text("version: 1\nonmiss: warn\n")
    settings(HWFUSE_CONFIG=str(path))
    result = run("config")
    assert result.code == 2
    assert result.err == (
        f"hwfuse config: {path}:2: unknown key 'onmiss' (did you mean 'on_miss'?)\n"
    )

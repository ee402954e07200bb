"""``hwfuse warmup``."""

from __future__ import annotations

import json

SMALL = ("--num-k-heads", "1", "--num-v-heads", "1", "--head-k-dim", "8", "--head-v-dim", "8")


def test_warmup_lists_run_every_combination(run):
    """``--m 1,4`` is one call for each number."""
    result = run("warmup", "fused_qkvzba", "--m", "1,4", *SMALL, "--device", "cpu", "--json")
    assert result.code == 0
    assert [decision["facts"]["m"] for decision in json.loads(result.out)] == [1, 4]


def test_warmup_table_shows_what_runs(run):
    """The text says for each size what runs and how long the first call took."""
    result = run("warmup", "fused_qkvzba", "--m", "2", *SMALL, "--device", "cpu")
    assert "m=2 num_k_heads=1" in result.out
    assert "reference/torch" in result.out

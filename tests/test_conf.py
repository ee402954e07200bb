"""The files in conf/."""

from __future__ import annotations

from pathlib import Path

import pytest

import hwfuse
from hwfuse import _policy, _policy_file, _state

CONF = Path(__file__).parents[1] / "conf"
FILES = sorted(CONF.glob("*.yaml"))


@pytest.fixture
def configured():
    """Put one file in force."""
    yield hwfuse.configure
    hwfuse.configure(None)


def test_default_file_is_the_built_in_policy():
    """conf/default.yaml says what the library does by itself: order, on_miss, block."""
    written = _policy_file.from_file(CONF / "default.yaml")
    assert written.on_miss[0] == _policy.BUILT_IN.on_miss[0]
    assert written.block == _policy.BUILT_IN.block
    assert list(written.ops) == list(_policy.BUILT_IN.ops) == ["*"]
    assert written.ops["*"].order.ids == _policy.BUILT_IN_ORDER
    assert written.ops["*"].rules == ()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_file_names_only_what_there_is(path, configured):
    """Every key, op and id of a file exists: nothing is an error and every backend is known."""
    configured(path)
    known = {*_policy.BUILT_IN_ORDER, "reference/torch"}
    for order in _policy_file.orders(_policy.Policy((_policy_file.from_file(path),))):
        assert set(order.ids) <= known
    assert set(_state.policy().block) <= {"cuda", "rocm"}


@pytest.mark.parametrize(
    ("name", "device", "other"), [("nvidia", "cuda:sm90", "rocm"), ("amd", "rocm:gfx950", "cuda")]
)
def test_vendor_file_leaves_the_other_vendor_out(name, device, other, configured):
    """A vendor's file blocks the other vendor's plugin, and says so."""
    path = CONF / f"{name}.yaml"
    configured(path)
    decision = hwfuse.explain("fused_qkvzba", device=device)
    assert not any(identifier.startswith(f"{other}/") for identifier in decision.rejected)


def test_reference_file_pins_the_reference(configured):
    """conf/reference.yaml: plain PyTorch everywhere, by a pin that explain names."""
    path = CONF / "reference.yaml"
    configured(path)
    decision = hwfuse.explain("fused_qkvzba", device="cuda:sm90")
    assert decision.chosen == "reference/torch"
    assert decision.origin == f"{path}:10"

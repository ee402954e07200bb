"""Variants: declared in an implementation's file, shown by explain, tried by the parity harness."""

import pytest

import hwfuse
from hwfuse import _spec, _state, _variants
from hwfuse._implementation import Implementation
from hwfuse.testing import _matrix

FILE = """
REQUIRES = {}
VARIANTS = {"few": "m <= 40", "many": "m > 40"}
"""


@pytest.fixture
def written(tmp_path):
    """An implementation whose file declares two variants."""
    path = tmp_path / "fused_qkvzba.py"
    path.write_text(FILE)
    return Implementation("acme/x", "fused_qkvzba", None, "x", path, function=lambda: None)


@pytest.mark.parametrize(("m", "shown"), [(40, "few: m <= 40"), (41, "many: m > 40")])
def test_explain_shows_the_variant_on_either_side_of_its_threshold(written, monkeypatch, m, shown):
    """The decision's facts name the variant, and its text says it beside what was chosen."""
    added = {"fused_qkvzba": {"acme/x": written}}
    monkeypatch.setattr(_state.registry(), "added", added)
    with hwfuse.using(fused_qkvzba="acme/x"):
        decision = hwfuse.explain("fused_qkvzba", device="cpu", m=m)
    assert decision.facts["variant"] == shown
    assert f"chosen    acme/x, {shown}" in str(decision)


def test_variant_of_an_unknown_name_is_an_error(written):
    """A variant reads arguments and sizes, like a fact of REQUIRES."""
    written.path.write_text('VARIANTS = {"few": "rows <= 40"}')
    with pytest.raises(ValueError, match="rows"):
        _variants.read(written)


def test_parity_tries_the_calls_around_a_variants_threshold(written):
    """One below, at, and one above."""
    found = _matrix.inputs(_spec.load("fused_qkvzba"), None, written)
    assert {39, 40, 41} <= {keywords["m"] for keywords in found.values()}


def test_every_variant_of_ours_can_be_read():
    """Each fact parses and reads only names that its op has."""
    for op in hwfuse.op_names():
        for implementation in _state.registry().implementations(op).values():
            assert isinstance(_variants.read(implementation), dict)

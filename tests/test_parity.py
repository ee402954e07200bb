"""Every implementation of every op agrees with the reference and keeps the op's contract."""

from pathlib import Path

from hwfuse import _spec
from hwfuse.testing import _matrix, parity, parity_tests

MATRIX = _matrix.read(Path(__file__).with_name("parity_matrix.py"))

test_parity = parity_tests(matrix=MATRIX)


def test_matrix_has_a_line_for_each_op():
    """An op that is not in the matrix is not proved."""
    assert set(MATRIX) == set(_spec.names())


def test_each_implementation_is_what_some_call_gets():
    """An implementation that nobody gets without asking is dead weight, unless it says so."""
    notes = {c.name: c.prove() for c in parity.checks(matrix=MATRIX) if c.label == "reached"}
    assert notes
    assert not {name: note for name, note in notes.items() if note}

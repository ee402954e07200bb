"""The decision: for one call, every candidate and why it was or was not chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Decision:
    """Why one implementation runs.

    Attributes:
        op: Name of the op.
        chosen: Id of the implementation that runs; empty if nothing can.
        rejected: Ids that cannot run this call, each with all its reasons.
        passed_over: Ids that could run and rank lower, in order.
        origin: Who set the order: ``h200.yaml:14``, ``hwfuse.using``, ``built-in``.
        facts: What was known of the call: target, dtypes, sizes, options.
        pretended: True if the target is not what the tensors really lie on.
        misses: Preferred ids that could not run.
        notes: Declared copies of the chosen one, packages assumed on absent hardware.
    """

    op: str
    chosen: str
    rejected: Mapping[str, tuple[str, ...]]
    passed_over: tuple[str, ...]
    origin: str
    facts: Mapping[str, Any]
    pretended: bool = False
    misses: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def kind(self) -> tuple[Any, ...]:
        """Equal for calls that differ only in what was found, not in any candidate's fate."""
        needs = ((name, *(reason.partition("; found")[0] for reason in reasons))
                 for name, reasons in self.rejected.items())  # fmt: skip
        call = (self.op, self.facts["target"], self.pretended, self.origin)
        return (*call, self.chosen, self.passed_over, *needs)

    def __str__(self) -> str:
        from hwfuse import _decision_text

        return _decision_text.text(self)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        from hwfuse import _decision_text

        return _decision_text.plain(self)

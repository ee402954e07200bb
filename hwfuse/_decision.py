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
        pretended = " (pretended)" if self.pretended else ""
        lines = [f"{self.op} on {self.facts['target']}{pretended}, order from {self.origin}"]
        known = [f"{name}={value}" for name, value in self.facts.items() if name != "target"]
        lines.append("  call: " + " ".join(known))
        width = max(map(len, (self.chosen, *self.passed_over, *self.rejected)), default=0)
        if self.chosen:
            lines.append(f"  chosen    {self.chosen}")
        lines += [f"  could run {name:{width}}  ranked lower" for name in self.passed_over]
        for name, reasons in self.rejected.items():
            lines.append(f"  rejected  {name:{width}}  {reasons[0]}")
            lines += [" " * (14 + width) + reason for reason in reasons[1:]]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "op": self.op,
            "chosen": self.chosen or None,
            "rejected": {name: list(reasons) for name, reasons in self.rejected.items()},
            "passed_over": list(self.passed_over),
            "origin": self.origin,
            "facts": {name: _json(value) for name, value in self.facts.items()},
            "pretended": self.pretended,
            "misses": list(self.misses),
            "notes": list(self.notes),
        }


def _json(value: Any) -> Any:
    return value if isinstance(value, int | float | str | bool | None) else str(value)

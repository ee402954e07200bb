"""A decision as a person reads it, and as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hwfuse._decision import Decision


def text(decision: Decision) -> str:
    """Return what a person reads of a decision."""
    pretended = " (pretended)" if decision.pretended else ""
    lines = [
        f"{decision.op} on {decision.facts['target']}{pretended}, order from {decision.origin}"
    ]
    apart = ("target", "variant")
    known = [f"{name}={value}" for name, value in decision.facts.items() if name not in apart]
    lines.append("  call: " + " ".join(known))
    width = max(map(len, (decision.chosen, *decision.passed_over, *decision.rejected)), default=0)
    if decision.chosen:
        variant = decision.facts.get("variant")
        lines.append(f"  chosen    {decision.chosen}" + (f", {variant}" if variant else ""))
    lines += [f"  could run {name:{width}}  ranked lower" for name in decision.passed_over]
    for name, reasons in decision.rejected.items():
        lines.append(f"  rejected  {name:{width}}  {reasons[0]}")
        lines += [" " * (14 + width) + reason for reason in reasons[1:]]
    lines += [f"  note: {note}" for note in decision.notes]
    return "\n".join(lines)


def plain(decision: Decision) -> dict[str, Any]:
    """Return a decision as plain JSON values."""
    return {
        "op": decision.op,
        "chosen": decision.chosen or None,
        "rejected": {name: list(reasons) for name, reasons in decision.rejected.items()},
        "passed_over": list(decision.passed_over),
        "origin": decision.origin,
        "facts": {name: _json(value) for name, value in decision.facts.items()},
        "pretended": decision.pretended,
        "misses": list(decision.misses),
        "notes": list(decision.notes),
    }


def _json(value: Any) -> Any:
    return value if isinstance(value, int | float | str | bool | None) else str(value)

"""Selection: facts in, decision out.  Pure: everything it looks at is an argument."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hwfuse._decision import Decision
from hwfuse._device import Target
from hwfuse._facts import Fact
from hwfuse._implementation import REFERENCE, Implementation
from hwfuse._plugins import Registry
from hwfuse._policy import BUILT_IN_ORDER, REST, Order


@dataclass(frozen=True)
class Call:
    """What selection knows of a call.

    `values`: arguments, sizes, arch, vendor by name.  `absent`: nothing will run, the hardware is
    elsewhere.  `unknown`: what facts may read and is not known yet (`Op.bind`).
    """

    op: str
    target: Target
    values: Mapping[str, Any]
    facts: Mapping[str, Any]
    needs_gradient: bool = False
    pretended: bool = False
    absent: bool = False
    unknown: frozenset[str] = frozenset()


def select(call: Call, order: Order, registry: Registry) -> Decision:
    """Choose for one call.  `Decision.chosen` is empty when every candidate rejects it."""
    implementations = registry.implementations(call.op)
    ranked = ranking(call, order, registry)
    rejected: dict[str, tuple[str, ...]] = {}
    able: list[str] = []
    for identifier in ranked:
        named = identifier in order.named
        reasons = _reasons(identifier, implementations, call, registry, named=named)
        if reasons:
            rejected[identifier] = reasons
        else:
            able.append(identifier)
    for identifier in (*order.named, *implementations, *registry.ids()):
        if identifier not in ranked:
            rejected.setdefault(identifier, (_left_out(identifier, call, order, registry),))
    chosen = able[0] if able else ""
    before = ranked.index(chosen) if chosen else len(ranked)
    # An order for all ops names ids that some ops do not have: that is no refusal.
    could_miss = [i for i in order.named
                  if i in implementations or registry.unusable(i) or order.op != "*"]  # fmt: skip
    return Decision(
        op=call.op,
        chosen=chosen,
        rejected=rejected,
        passed_over=tuple(able[1:]),
        origin=order.origin,
        facts=call.facts,
        pretended=call.pretended,
        misses=tuple(i for i in ranked[:before] if i in could_miss),
        notes=_notes(implementations.get(chosen), call),
    )


def ranking(call: Call, order: Order, registry: Registry) -> list[str]:
    """Return the ids that compete for a call, most preferred first; the reference stands last."""
    ranked = list(order.named)
    if order.ids[-1] == REST:
        rest = (*BUILT_IN_ORDER[:-1], *registry.ids(), *registry.implementations(call.op))
        ranked = list(dict.fromkeys((*ranked, *rest)))
    if not order.pin and REFERENCE not in order.named:
        ranked = [i for i in ranked if i != REFERENCE] + [REFERENCE]
    return [i for i in ranked if _serves(registry.vendor_of(i), call.target)]


def deciding_facts(call: Call, order: Order, registry: Registry) -> set[Fact]:
    """Return the facts that can change the choice among the ids that compete on this target."""
    implementations = registry.implementations(call.op)
    facts: set[Fact] = set()
    for identifier in ranking(call, order, registry):
        implementation = implementations.get(identifier)
        named = identifier in order.named
        if implementation is None or _standing(implementation, call, named=named):
            continue
        facts.update(implementation.requires.facts)
        if not implementation.requires.facts:
            break  # it takes every call, so nothing behind it matters
    return facts


def _serves(vendor: str | None, target: Target) -> bool:
    return vendor is None or vendor == target.vendor


def _reasons(
    identifier: str,
    implementations: Mapping[str, Implementation],
    call: Call,
    registry: Registry,
    *,
    named: bool,
) -> tuple[str, ...]:
    implementation = implementations.get(identifier)
    if implementation is None:
        why = registry.unusable(identifier)
        return (why or f"{identifier} has no implementation of {call.op}",)
    reasons = _standing(implementation, call, named=named)
    if implementation.problem is None:
        reasons += _fact_reasons(implementation.requires.facts, call)
    return tuple(reasons)


def _standing(implementation: Implementation, call: Call, *, named: bool) -> list[str]:
    """Return the reasons that do not depend on the call's tensors."""
    requires = implementation.requires
    if implementation.problem is not None:
        return [implementation.problem]
    reasons: list[str] = []
    if requires.arch and call.target.arch not in requires.arch:
        reasons.append(f"needs arch in {', '.join(requires.arch)}; found {call.target.arch}")
    if requires.experimental and not named:
        reasons.append("experimental: runs only when an order or a pin names it")
    if call.needs_gradient and not requires.differentiable:
        reasons.append("a gradient is needed and it is not differentiable")
    if requires.packages and not call.absent:
        from hwfuse._packages import missing

        # Meta tensors run nowhere: what stands behind them may be a GPU.
        is_meta = any(getattr(value, "is_meta", False) for value in call.values.values())
        on_cpu = call.pretended and not is_meta
        reasons += filter(None, (missing(one, on_cpu) for one in requires.packages))
    return reasons


def _fact_reasons(facts: Sequence[Fact], call: Call) -> list[str]:
    reasons = []
    for fact in facts:
        if fact.reads & call.unknown:
            reasons.append(f"not known yet whether {fact.source}")
        elif not fact.holds(call.values):
            from hwfuse import _report

            reasons.append(_report.reason(fact, call.values))
    return reasons


def _left_out(identifier: str, call: Call, order: Order, registry: Registry) -> str:
    vendor = registry.vendor_of(identifier)
    if not _serves(vendor, call.target):
        return f"serves {vendor}; this call is on {call.target}"
    what = "another one is pinned" if order.pin else "not in the order"
    return f"{what} ({order.origin})"


def _notes(chosen: Implementation | None, call: Call) -> tuple[str, ...]:
    if chosen is None:
        return ()
    notes = [f"copies {name}: {how}" for name, how in chosen.copies.items()]
    if call.absent and chosen.requires.packages:
        notes.append(f"assumes that {call.target} has {', '.join(chosen.requires.packages)}")
    return tuple(notes)

"""Put hwfuse's ops into a transformers model that exists already: `patch`, `unpatch`, `supported`.

    report = patch(model)      # the model's own forward, with one op call in place of its split
    print(report)
    unpatch(model)

Weights, state dict, configuration and class names stay as they are, and the model's own linears are
still called, with whatever wraps or replaces them.  Rules match the text of a class, never a
version number of transformers: a class whose text has changed is an error that shows the
difference.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, Literal

import torch
from torch import nn

import hwfuse
from hwfuse._errors import InputError, IntegrationError
from hwfuse.integrations import _qwen3_next
from hwfuse.integrations._rewrite import Rule, SourceChanged, rewritten_class, rule_of, stock_class

__all__ = [
    "PatchReport",
    "PatchedClass",
    "SkippedClass",
    "SourceChanged",
    "patch",
    "supported",
    "unpatch",
]

_RULES: tuple[Rule, ...] = (_qwen3_next.RULE,)
_TOKENS = (1, 4096)  # one decode step and a long prompt: where choices differ most


@dataclass(frozen=True)
class PatchedClass:
    """Modules of one class that a rule rewrote: how many, by which rule, to call which ops."""

    name: str
    modules: int
    rule: str
    version: int
    ops: tuple[str, ...]


@dataclass(frozen=True)
class SkippedClass:
    """Modules that a rule is written for and that stay as they are, and why."""

    name: str
    modules: int
    reason: str


@dataclass(frozen=True)
class PatchReport:
    """What `patch` did, or what it would do (`supported`).  `str()` is for people.

    Attributes:
        model: Class of the model.
        transformers: Version that is imported; empty if none is.
        applied: False from `supported`, which changes nothing.
        patched: Classes rewritten by this call.
        already: Classes that an earlier call rewrote.
        skipped: Classes left alone, with reasons.
        decisions: What each op would run on each device that the weights lie on, for one token
            and for a long prompt.  Empty while the weights have no device (meta).
    """

    model: str
    transformers: str
    applied: bool
    patched: tuple[PatchedClass, ...]
    already: tuple[PatchedClass, ...]
    skipped: tuple[SkippedClass, ...]
    decisions: tuple[hwfuse.Decision, ...] = field(repr=False)

    def __str__(self) -> str:
        count = sum(entry.modules for entry in self.patched)
        verb = "patched" if self.applied else "can be patched"
        model = f"{self.model}, transformers {self.transformers or 'not imported'}"
        lines = [f"{model}: {_modules(count)} {verb}"]
        for title, entries in (("", self.patched), ("already patched: ", self.already)):
            for entry in entries:
                ops = ", ".join(entry.ops)
                what = f"{title}{entry.name}, {_modules(entry.modules)}"
                lines.append(f"  {what}, rule {entry.rule} v{entry.version}, calls {ops}")
        lines += [
            f"  skipped: {skip.name}, {_modules(skip.modules)}: {skip.reason}"
            for skip in self.skipped
        ]
        tokens: dict[str, dict[str, None]] = {}  # ordered, without what several devices repeat
        for decision in self.decisions:
            where = f"{decision.facts['target']}, order from {decision.origin}"
            line = f"  {decision.op} runs {decision.chosen or 'nothing'} on {where}"
            tokens.setdefault(line, {})[str(decision.facts["m"])] = None
        lines += [f"{line}, at m = {', '.join(m)}" for line, m in tokens.items()]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "model": self.model,
            "transformers": self.transformers,
            "applied": self.applied,
            "patched": [vars(entry) | {"ops": list(entry.ops)} for entry in self.patched],
            "already": [vars(entry) | {"ops": list(entry.ops)} for entry in self.already],
            "skipped": [dict(vars(skip)) for skip in self.skipped],
            "decisions": [decision.to_dict() for decision in self.decisions],
        }


def patch(
    model: nn.Module,
    *,
    ops: Collection[str] | None = None,
    pack: Literal["auto", "never", "view"] = "auto",
    strict: bool = True,
) -> PatchReport:
    """Make a transformers model call hwfuse's ops, in place; a second call changes nothing.

    Modules get a subclass of their own class, of the same name, with an edited `forward`.  The
    choice of implementation stays with the policy at each call:
    ``with hwfuse.using("reference/torch")`` or ``HWFUSE_USE="*=reference/torch"`` switches every
    accelerated one off, `unpatch` takes the ops out.

    Args:
        model: The model; any `nn.Module` that contains supported classes.
        ops: Only rules whose ops are all among these; None means every rule.
        pack: Whether a rule may lay weights out anew.  Qwen3-Next's needs no packing, so all
            three values do the same for it.
        strict: If a class that a rule is written for cannot be rewritten, or nothing at all was
            found, raise and change nothing.  Otherwise the report says so.

    Raises:
        SourceChanged: A class's text is not what the rule replaces; shows both.
        IntegrationError: Nothing to patch, or a module's forward is already replaced by another
            library.
        InputError: `ops` or `pack` has an unknown value.
    """
    if pack not in ("auto", "never", "view"):
        raise InputError("pack", repr(pack), "'auto', 'never' or 'view'")
    survey = _survey(model, ops)
    if strict:
        survey.raise_first()
    for module, cls in survey.plan:
        _set_class(module, cls)
    return survey.report(model, applied=True)


def supported(model_or_config: Any, *, ops: Collection[str] | None = None) -> PatchReport:
    """Say what `patch` would do, without changing anything.

    Args:
        model_or_config: A model, or a transformers configuration, whose model is then built
            without memory for its weights (on the meta device).
        ops: As for `patch`.
    """
    model = model_or_config
    if not isinstance(model, nn.Module):
        from transformers import AutoModel

        with torch.device("meta"):
            model = AutoModel.from_config(model_or_config)
    return _survey(model, ops).report(model, applied=False)


def unpatch(model: nn.Module) -> int:
    """Give every patched module its own class back; return how many there were."""
    plan = []
    for module in model.modules():
        if rule_of(module):
            stock = stock_class(type(module))
            if stock is None:
                name = type(module).__name__
                raise IntegrationError(f"{name} was derived from a patched class; undo that first")
            plan.append((module, stock))
    for module, stock in plan:
        _set_class(module, stock)
    return len(plan)


@dataclass
class _Survey:
    """What a walk over a model found; nothing is changed yet."""

    plan: list[tuple[nn.Module, type]] = field(default_factory=list)
    patched: Counter[tuple[str, Rule]] = field(default_factory=Counter)
    already: Counter[tuple[str, Rule]] = field(default_factory=Counter)
    skipped: Counter[tuple[str, str]] = field(default_factory=Counter)
    errors: list[IntegrationError] = field(default_factory=list)
    modules: list[tuple[nn.Module, Rule]] = field(default_factory=list)

    def raise_first(self) -> None:
        if self.errors:
            raise self.errors[0]
        if not self.modules and not self.skipped:
            known = ", ".join(name for rule in _RULES for name in rule.classes)
            raise IntegrationError(
                f"nothing to patch: found no class that hwfuse has a rule for, needed one of "
                f"{known}; with strict=False this is a report"
            )

    def report(self, model: nn.Module, *, applied: bool) -> PatchReport:
        return PatchReport(
            model=type(model).__name__,
            transformers=getattr(sys.modules.get("transformers"), "__version__", ""),
            applied=applied,
            patched=_entries(self.patched),
            already=_entries(self.already),
            skipped=tuple(SkippedClass(n, count, why) for (n, why), count in self.skipped.items()),
            decisions=_decisions(self.modules),
        )


def _survey(model: nn.Module, ops: Collection[str] | None) -> _Survey:
    known = {op for rule in _RULES for op in rule.ops}
    for op in ops or ():
        if op not in known:
            raise InputError("ops", repr(op), f"ops that a rule calls: {', '.join(sorted(known))}")
    survey = _Survey()
    for module in model.modules():
        cls: Any = type(module)
        name = cls.__name__
        if rule := rule_of(module):
            survey.already[name, rule] += 1
            survey.modules.append((module, rule))
        elif rule := _rule_for(cls):
            if ops is not None and not set(rule.ops) <= set(ops):
                survey.skipped[name, f"rule {rule} calls {', '.join(rule.ops)}"] += 1
                continue
            try:
                rewritten = rewritten_class(cls, rule)
                _check_instance(module, rule)
            except IntegrationError as error:
                survey.errors.append(error)
                survey.skipped[name, str(error)] += 1
            else:
                survey.plan.append((module, rewritten))
                survey.patched[name, rule] += 1
                survey.modules.append((module, rule))
    return survey


def _rule_for(cls: type) -> Rule | None:
    names = {base.__name__ for base in cls.__mro__}
    return next((rule for rule in _RULES if names & set(rule.classes)), None)


def _check_instance(module: nn.Module, rule: Rule) -> None:
    """Raise if this instance differs from its class in something that the rule relies on."""
    name = type(module).__name__
    if "forward" in vars(module) and not _bound_forwards(module):
        found = f"{name}: an instance has a forward of its own, which hides the class's"
        raise IntegrationError(f"{found}; undo what set it (kernelize, another patch), then patch")
    if objection := rule.objection(module):
        raise SourceChanged(f"{name}: rule {rule}: {objection}")


def _bound_forwards(module: nn.Module) -> list[str]:
    """Return the attributes that hold the class's forward, bound: accelerate's hooks make them."""
    return [
        name
        for name in ("forward", "_old_forward")
        if getattr(vars(module).get(name), "__func__", None) is type(module).forward
    ]


def _set_class(module: nn.Module, cls: Any) -> None:
    for name in _bound_forwards(module):  # a new class alone would not change them
        vars(module)[name] = MethodType(cls.forward, module)
    module.__class__ = cls


def _entries(counted: Counter[tuple[str, Rule]]) -> tuple[PatchedClass, ...]:
    return tuple(
        PatchedClass(name, count, rule.name, rule.version, rule.ops)
        for (name, rule), count in counted.items()
    )


def _decisions(modules: list[tuple[nn.Module, Rule]]) -> tuple[hwfuse.Decision, ...]:
    """Ask once for each op, device, size and token count; no input is made."""
    questions: set[tuple[str, str, tuple[tuple[str, Any], ...]]] = set()
    for module, rule in modules:
        device = next(module.parameters()).device
        if device.type != "meta":
            questions |= {
                (op, str(device), (*sizes(module).items(),)) for op, sizes in rule.examples
            }
    return tuple(
        hwfuse.explain(op, device=device, m=m, **dict(sizes))
        for op, device, sizes in sorted(questions, key=str)
        for m in _TOKENS
    )


def _modules(count: int) -> str:
    return f"{count} module{'' if count == 1 else 's'}"

"""Put hwfuse's ops into a transformers model that exists already: `patch`, `unpatch`, `supported`.

    report = patch(model)      # the model's own forward, with op calls in place of some statements
    print(report)
    unpatch(model)

State dict, configuration and class names stay as they are.  Linears that read the same input become
one GEMM, their weights views of one tensor; where something wraps or replaces one of them, the
model's own linears are called as before.  Rules match the text of a class, never a version number
of transformers: a class whose text has changed is an error that shows the difference.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any, Literal

import torch
from torch import nn

import hwfuse
from hwfuse._errors import InputError, IntegrationError
from hwfuse.integrations import (
    _gemma4,
    _kimi_linear,
    _qwen3_5,
    _qwen3_next,
    _view_packing,
)
from hwfuse.integrations._rewrite import (
    Rule,
    SourceChanged,
    Use,
    rewritten_class,
    rule_of,
    stock_class,
)

__all__ = [
    "PatchReport",
    "PatchedClass",
    "SkippedClass",
    "SourceChanged",
    "patch",
    "supported",
    "unpatch",
]

Pack = Literal["auto", "never", "view"]
_RULES: tuple[Rule, ...] = (_qwen3_next.RULE, _qwen3_5.RULE, _gemma4.RULE, _kimi_linear.RULE)
_TOKENS = (1, 4096)  # one decode step and a long prompt: where choices differ most


@dataclass(frozen=True)
class PatchedClass:
    """Modules of one class that a rule rewrote alike.

    Attributes:
        name: Class.
        modules: How many.
        rule, version: What rewrote them.
        ops: What they call now; may be empty where a GEMM's views are all that is needed.
        mode: What they do now, in words: which norms, how many GEMMs, views or copies.
    """

    name: str
    modules: int
    rule: str
    version: int
    ops: tuple[str, ...]
    mode: str


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
                ops = ", ".join(entry.ops) or "no op"
                what = f"{title}{entry.name}, {_modules(entry.modules)}"
                rule = f"rule {entry.rule} v{entry.version}"
                lines.append(f"  {what}, {rule}, calls {ops}: {entry.mode}")
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
    pack: Pack = "auto",
    strict: bool = True,
) -> PatchReport:
    """Make a transformers model call hwfuse's ops, in place; a second call changes nothing more.

    Modules get a subclass of their own class, of the same name, with an edited `forward`.  The
    choice of implementation stays with the policy at each call:
    ``with hwfuse.using("reference/torch")`` or ``HWFUSE_USE="*=reference/torch"`` switches every
    accelerated one off, `unpatch` takes the ops out.

    Args:
        model: The model; any `nn.Module` that contains supported classes.
        ops: Only rules whose ops are all among these; None means every rule.
        pack: How linears that read the same input are called.
            ``"auto"``: as one GEMM where they are plain, its weight one tensor of which their
            parameters are views.  The results are views too, or dense if what reads them needs it.
            ``"view"``: the same, always with views, and an error where that is impossible.
            ``"never"``: one by one.  Qwen3.5 and Kimi Linear then stay as they are.
            Qwen3-Next's two linears stay apart in any case.
        strict: If a class that a rule is written for cannot be rewritten, or nothing at all was
            found, raise and change nothing.  Otherwise the report says so.

    Raises:
        SourceChanged: A class's text is not what the rule replaces; shows both.
        IntegrationError: Nothing to patch, or a module's forward is already replaced by another
            library.
        InputError: `ops` or `pack` has an unknown value.
    """
    for module in model.modules():
        _view_packing.pack_again(module)  # a parameter may have been replaced since
    survey = _survey(model, ops, pack)
    if strict:
        survey.raise_first()
    for module, cls in survey.plan:
        _set_class(module, cls)
        vars(module)["hwfuse_pack"] = pack
        _view_packing.pack_again(module)
    return survey.report(model, applied=True)


def supported(
    model_or_config: Any, *, ops: Collection[str] | None = None, pack: Pack = "auto"
) -> PatchReport:
    """Say what `patch` would do, without changing anything.

    Args:
        model_or_config: A model, or a transformers configuration, whose model is then built
            without memory for its weights (on the meta device).
        ops: As for `patch`.
        pack: As for `patch`.
    """
    model = model_or_config
    if not isinstance(model, nn.Module):
        from transformers import AutoModel

        with torch.device("meta"):
            model = AutoModel.from_config(model_or_config)
    return _survey(model, ops, pack).report(model, applied=False)


def unpatch(model: nn.Module) -> int:
    """Give every patched module its own class back, and packed weights memory of their own.

    Returns how many modules there were.
    """
    plan = []
    for module in model.modules():
        if rule := rule_of(module):
            stock = stock_class(type(module))
            if stock is None:
                name = type(module).__name__
                raise IntegrationError(f"{name} was derived from a patched class; undo that first")
            plan.append((module, stock, rule))
    for module, stock, rule in plan:
        _set_class(module, stock)
        _view_packing.unpack(module, rule.packs(module))
        vars(module).pop("hwfuse_pack", None)
    return len(plan)


@dataclass
class _Survey:
    """What a walk over a model found; nothing is changed yet."""

    plan: list[tuple[nn.Module, Any]] = field(default_factory=list)
    patched: Counter[PatchedClass] = field(default_factory=Counter)
    already: Counter[PatchedClass] = field(default_factory=Counter)
    skipped: Counter[tuple[str, str]] = field(default_factory=Counter)
    errors: list[IntegrationError] = field(default_factory=list)
    uses: list[tuple[nn.Module, Use]] = field(default_factory=list)

    def raise_first(self) -> None:
        if self.errors:
            raise self.errors[0]
        if not self.uses and not self.skipped:
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
            decisions=_decisions(self.uses),
        )


def _survey(model: nn.Module, ops: Collection[str] | None, pack: Pack) -> _Survey:
    if pack not in ("auto", "never", "view"):
        raise InputError("pack", repr(pack), "'auto', 'never' or 'view'")
    known = {op for rule in _RULES for op in rule.ops}
    for op in ops or ():
        if op not in known:
            raise InputError("ops", repr(op), f"ops that a rule calls: {', '.join(sorted(known))}")
    survey = _Survey()
    for module in model.modules():
        name = type(module).__name__
        if rule := rule_of(module):
            use = _use_now(module, rule)
            survey.already[_entry(name, rule, use)] += 1
            survey.uses.append((module, use))
        elif rule := _rule_for(type(module)):
            try:
                reason = _reason_to_skip(module, rule, ops, pack)
                rewritten = None if reason else _checked_class(module, rule, pack)
            except IntegrationError as error:
                survey.errors.append(error)
                reason = str(error)
            if reason:
                survey.skipped[name, reason] += 1
                continue
            use = rule.use(module, pack)
            survey.plan.append((module, rewritten))
            survey.patched[_entry(name, rule, use)] += 1
            survey.uses.append((module, use))
    return survey


def _reason_to_skip(
    module: nn.Module, rule: Rule, ops: Collection[str] | None, pack: Pack
) -> str | None:
    """Say why nothing is to be done here, which is no error, or None."""
    if ops is not None and not set(rule.ops) <= set(ops):
        return f"rule {rule} calls {', '.join(rule.ops)}"
    if rule.needs_packs and pack == "never":
        return "pack='never' keeps its own linears, which leaves nothing to fuse"
    if rule.needs_packs and pack == "auto" and (found := _obstacle(module, rule)):
        return f"{found}: its own linears are called, which leaves nothing to fuse"
    return None


def _checked_class(module: nn.Module, rule: Rule, pack: Pack) -> type:
    """Return the class for this instance; raise if it cannot be rewritten as asked."""
    rewritten = rewritten_class(type(module), rule)
    _check_instance(module, rule)
    if pack == "view" and (found := _obstacle(module, rule)):
        name = type(module).__name__
        raise IntegrationError(f"{name}: pack='view' needs plain linears, but {found}")
    return rewritten


def _obstacle(module: nn.Module, rule: Rule) -> str | None:
    return _view_packing.obstacle(rule.packs(module))


def _use_now(module: Any, rule: Rule) -> Use:
    """Return what a patched module does: something may have replaced its linears since."""
    found = _view_packing.what_is_not_packed(module, rule.packs(module))
    if not found:
        return rule.use(module, module.hwfuse_pack)
    if rule.needs_packs:
        return Use(f"its own linears: {found}")
    return rule.use(module, "never")


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


def _entry(name: str, rule: Rule, use: Use) -> PatchedClass:
    """Describe one module; what is equal is counted."""
    return PatchedClass(
        name, 1, rule.name, rule.version, tuple(op for op, _ in use.calls), use.mode
    )


def _entries(counted: Counter[PatchedClass]) -> tuple[PatchedClass, ...]:
    return tuple(replace(entry, modules=count) for entry, count in counted.items())


def _decisions(uses: list[tuple[nn.Module, Use]]) -> tuple[hwfuse.Decision, ...]:
    """Ask once for each op, device, size and token count; no input is made."""
    questions: set[tuple[str, str, tuple[tuple[str, Any], ...]]] = set()
    for module, use in uses:
        device = next(module.parameters()).device
        if device.type != "meta":
            questions |= {(op, str(device), (*sizes.items(),)) for op, sizes in use.calls}
    return tuple(
        hwfuse.explain(op, device=device, m=m, **dict(sizes))
        for op, device, sizes in sorted(questions, key=str)
        for m in _TOKENS
    )


def _modules(count: int) -> str:
    return f"{count} module{'' if count == 1 else 's'}"

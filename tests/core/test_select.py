"""Selection as a pure function: a call, an order and a registry in, a decision out."""

from __future__ import annotations

import json

import pytest
import torch

from hwfuse import _policy, _policy_file, _select, _spec
from hwfuse._device import Target
from hwfuse._implementation import REFERENCE, Implementation, parse_requires
from hwfuse._plugins import Backend, Registry
from hwfuse._select import Call

OP = "fp8_group_quant"
HERE = "h200.yaml:14"
NVIDIA = Target("nvidia", "sm90")
AMD = Target("amd", "gfx950")
BUILT_IN = _policy.BUILT_IN.ops["*"].order


def make_registry(**requires):
    """Return ours, plus ``acme/fast``; *requires* by id with ``__`` for the slash."""
    backends = [
        Backend("acme", "acme", None, {"fast": ()}),
        Backend("cuda", "cuda", "nvidia", dict.fromkeys(("cutlass", "cublas", "triton"), ())),
        Backend("reference", "reference", None, {"torch": ()}),
        Backend("rocm", "rocm", "amd", dict.fromkeys(("aiter", "triton"), ())),
    ]
    registry = Registry(backends={backend.name: backend for backend in backends})
    requires = {"reference__torch": {}, **requires}
    registry._files[OP] = {
        (i := name.replace("__", "/")): Implementation(
            i, OP, registry.vendor_of(i), "", None, parse_requires(data, _spec.load(OP))
        )
        for name, data in requires.items()
    }
    return registry


def choose(order, registry, target=NVIDIA, **keywords):
    """Select for a call with m = 8."""
    values = {"m": 8, "x": torch.zeros(8, 128), "arch": target.arch, "vendor": target.vendor}
    call = Call(OP, target, values, {"target": str(target), "m": 8}, **keywords)
    return _select.select(call, order, registry)


def listed(*ids, op=OP):
    """Return the order of a list."""
    return _policy_file.make_order(list(ids), HERE, op)


def pinned(identifier):
    """Return the order of a string."""
    return _policy_file.make_order(identifier, HERE, OP)


def test_list_first_that_can_runs_and_the_rest_is_passed_over():
    """The order is from most to least preferred."""
    registry = make_registry(cuda__triton={}, cuda__cublas={})
    decision = choose(listed("cuda/cublas", "cuda/triton"), registry)
    assert decision.chosen == "cuda/cublas"
    assert decision.passed_over == ("cuda/triton", REFERENCE)
    assert decision.origin == HERE
    assert decision.misses == ()


def test_list_what_is_not_in_it_is_not_used_and_the_decision_says_so():
    """A list is complete; file and line are in the reason."""
    registry = make_registry(cuda__triton={}, cuda__cublas={})
    decision = choose(listed("cuda/cublas"), registry)
    assert decision.rejected["cuda/triton"] == ("not in the order (h200.yaml:14)",)
    assert decision.rejected["acme/fast"] == ("not in the order (h200.yaml:14)",)


def test_list_that_cannot_run_falls_to_the_reference():
    """``reference/torch`` is last, unwritten."""
    registry = make_registry(cuda__triton={"facts": ("m > 64",)})
    decision = choose(listed("cuda/triton"), registry)
    assert decision.chosen == REFERENCE
    assert decision.rejected["cuda/triton"] == ("needs m > 64; found m = 8",)
    assert decision.misses == ("cuda/triton",)


def test_pin_that_cannot_run_chooses_nothing():
    """A string pins: nothing else is tried, the reference neither."""
    registry = make_registry(cuda__triton={"facts": ("m > 64",)}, cuda__cublas={})
    decision = choose(pinned("cuda/triton"), registry)
    assert decision.chosen == ""
    assert decision.passed_over == ()
    assert decision.rejected[REFERENCE] == ("another one is pinned (h200.yaml:14)",)
    assert decision.rejected["cuda/cublas"] == ("another one is pinned (h200.yaml:14)",)


def test_pin_of_the_reference_runs_it():
    """The reference can be pinned as any other."""
    assert choose(pinned(REFERENCE), make_registry(cuda__triton={})).chosen == REFERENCE


def test_rest_follows_in_built_in_order_and_strangers_after_it():
    """``...`` means the rest, in built-in order, whatever the plugins' names sort to."""
    registry = make_registry(cuda__cutlass={}, cuda__triton={}, cuda__cublas={}, acme__fast={})
    decision = choose(listed("cuda/triton", "..."), registry)
    ranked = (decision.chosen, *decision.passed_over)
    assert ranked == ("cuda/triton", "cuda/cutlass", "cuda/cublas", "acme/fast", REFERENCE)


def test_built_in_order_is_the_list_in_default_yaml():
    """Without settings the ids rank as `BUILT_IN_ORDER` says."""
    registry = make_registry(
        cuda__triton={}, cuda__cutlass={}, cuda__cublas={}, rocm__triton={}, rocm__aiter={}
    )
    for target in (NVIDIA, AMD):
        decision = choose(BUILT_IN, registry, target)
        ranked = (decision.chosen, *decision.passed_over)
        expected = [i for i in _policy.BUILT_IN_ORDER if i in ranked]
        assert ranked == (*expected, REFERENCE)


def test_other_vendors_id_is_skipped_and_no_miss():
    """One list serves both vendors."""
    registry = make_registry(cuda__triton={}, rocm__triton={})
    decision = choose(listed("cuda/triton", "rocm/triton"), registry, AMD)
    assert (decision.chosen, decision.misses) == ("rocm/triton", ())
    assert decision.rejected["cuda/triton"] == ("serves nvidia; this call is on rocm:gfx950",)


def test_other_vendors_id_when_its_backend_is_blocked_is_no_miss():
    """On AMD, blocking cuda is the natural thing to do."""
    registry = make_registry(rocm__triton={})
    del registry.backends["cuda"]
    registry.blocked["cuda"] = "amd.yaml:3"
    decision = choose(listed("cuda/triton", "rocm/triton"), registry, AMD)
    assert (decision.chosen, decision.misses) == ("rocm/triton", ())
    assert decision.rejected["cuda/triton"] == ("serves nvidia; this call is on rocm:gfx950",)


def test_other_vendors_pin_chooses_nothing():
    """A pin that cannot run is an error, on other hardware too."""
    decision = choose(pinned("cuda/triton"), make_registry(cuda__triton={}), AMD)
    assert decision.chosen == ""
    assert decision.rejected["cuda/triton"] == ("serves nvidia; this call is on rocm:gfx950",)


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({}, "backend cuda is not installed"),
        ({"blocked": {"cuda": "HWFUSE_BLOCK"}}, "backend cuda is blocked by HWFUSE_BLOCK"),
        ({"problems": {"cuda": "ImportError: no"}}, "backend cuda is broken: ImportError: no"),
    ],
)
def test_backend_that_is_not_loaded_is_a_reason_and_a_miss(state, reason):
    """Absent, blocked or broken: the user's id cannot run, and is told why."""
    registry = make_registry()
    del registry.backends["cuda"]
    for name, value in state.items():
        setattr(registry, name, value)
    decision = choose(listed("cuda/triton"), registry)
    assert decision.rejected["cuda/triton"] == (reason,)
    assert decision.misses == ("cuda/triton",)


def test_provider_without_this_op_is_a_miss_only_if_named_for_the_op():
    """A list for all ops names ids that some ops do not have."""
    registry = make_registry(cuda__triton={})
    decision = choose(listed("cuda/cutlass", "cuda/triton"), registry)
    assert decision.misses == ("cuda/cutlass",)
    assert decision.rejected["cuda/cutlass"] == ("cuda/cutlass has no implementation of " + OP,)
    decision = choose(listed("cuda/cutlass", "cuda/triton", op="*"), registry)
    assert decision.misses == ()


def test_built_in_order_is_never_missed():
    """A miss is an id that the user named."""
    registry = make_registry(cuda__triton={"facts": ("m > 64",)})
    decision = choose(BUILT_IN, registry)
    assert (decision.chosen, decision.misses) == (REFERENCE, ())


def test_id_ranked_below_the_chosen_is_no_miss():
    """What was preferred less was not missed."""
    registry = make_registry(cuda__triton={}, cuda__cublas={"facts": ("m > 64",)})
    assert choose(listed("cuda/triton", "cuda/cublas"), registry).misses == ()


def test_experimental_runs_only_when_named():
    """Neither the built-in order nor ``...`` names it; an order or a pin does."""
    registry = make_registry(cuda__triton={"experimental": True})
    reason = ("experimental: runs only when an order or a pin names it",)
    for order in (BUILT_IN, listed("cuda/cublas", "...")):
        decision = choose(order, registry)
        assert decision.chosen == REFERENCE
        assert decision.rejected["cuda/triton"] == reason
    assert choose(listed("cuda/triton"), registry).chosen == "cuda/triton"
    assert choose(pinned("cuda/triton"), registry).chosen == "cuda/triton"


def test_every_reason_is_kept():
    """A refusal lists all that is wrong, in the order declared."""
    requires = {
        "arch": ("sm100",),
        "packages": ("no-such-package",),
        "facts": ("m > 64", "x.dtype == bfloat16", "m < 100"),
    }
    registry = make_registry(cuda__triton=requires)
    decision = choose(BUILT_IN, registry, needs_gradient=True)
    assert decision.rejected["cuda/triton"] == (
        "needs arch in sm100; found sm90",
        "a gradient is needed and it is not differentiable",
        "needs no-such-package; no-such-package is not installed",
        "needs m > 64; found m = 8",
        "needs x.dtype == bfloat16; found x.dtype = float32",
    )


def test_absent_hardware_packages_are_assumed_and_noted():
    """What-if: the packages of another machine cannot be looked at."""
    registry = make_registry(cuda__triton={"packages": ("no-such-package",)})
    decision = choose(BUILT_IN, registry, absent=True)
    assert decision.chosen == "cuda/triton"
    assert decision.notes == ("assumes that cuda:sm90 has no-such-package",)


def test_problem_is_the_reason_and_nothing_else_of_the_file_counts():
    """A file that could not be read is never chosen; its facts were not read either."""
    registry = make_registry(cuda__triton={}, cuda__cublas={})
    registry._files[OP]["cuda/cublas"].problem = "cublas.py: no REQUIRES"
    decision = choose(BUILT_IN, registry)
    assert decision.chosen == "cuda/triton"
    assert decision.rejected["cuda/cublas"] == ("cublas.py: no REQUIRES",)


def test_declared_copy_is_noted():
    """An adapter that converts an argument says so."""
    registry = make_registry(cuda__triton={})
    registry._files[OP]["cuda/triton"].copies = {"x": "row -> column"}
    assert choose(BUILT_IN, registry).notes == ("copies x: row -> column",)


def test_unknown_fact_is_a_reason():
    """`bind` does not guess."""
    registry = make_registry(cuda__triton={"facts": ("m <= 64",)})
    decision = choose(BUILT_IN, registry, unknown=frozenset({"m"}))
    assert decision.rejected["cuda/triton"] == ("not known yet whether m <= 64",)


def test_deciding_facts_are_those_of_candidates_up_to_one_that_takes_all():
    """What cannot change the choice is not looked at on the hot path."""
    registry = make_registry(
        cuda__cutlass={"arch": ("sm100",), "facts": ("m == 1",)},
        cuda__deepgemm={"facts": ("m > 64",)},
        cuda__triton={},
        acme__fast={"facts": ("m == 3",)},
    )
    call = Call(OP, NVIDIA, {}, {})
    facts = _select.deciding_facts(call, BUILT_IN, registry)
    assert {fact.source for fact in facts} == {"m > 64"}


def test_decision_str_shows_every_candidate():
    """What a person reads: chosen, passed over, rejected with all reasons, notes."""
    requires = {"facts": ("m > 64", "m % 3 == 0"), "differentiable": True}
    registry = make_registry(cuda__cublas=requires, cuda__triton={})
    registry._files[OP]["cuda/triton"].copies = {"x": "row -> column"}
    decision = choose(listed("cuda/cublas", "cuda/triton"), registry, pretended=True)
    assert str(decision).splitlines() == [
        "fp8_group_quant on cuda:sm90 (pretended), order from h200.yaml:14",
        "  call: m=8",
        "  chosen    cuda/triton",
        "  could run reference/torch  ranked lower",
        "  rejected  cuda/cublas      needs m > 64; found m = 8",
        "                             needs m % 3 == 0; found m % 3 = 2",
        "  rejected  acme/fast        not in the order (h200.yaml:14)",
        "  rejected  cuda/cutlass     not in the order (h200.yaml:14)",
        "  rejected  rocm/aiter       serves amd; this call is on cuda:sm90",
        "  rejected  rocm/triton      serves amd; this call is on cuda:sm90",
        "  note: copies x: row -> column",
    ]


def test_decision_to_dict_is_json():
    """Scripts read it."""
    registry = make_registry(cuda__triton={"facts": ("m > 64",)})
    decision = choose(listed("cuda/triton"), registry)
    data = decision.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert data["chosen"] == REFERENCE
    assert data["rejected"]["cuda/triton"] == ["needs m > 64; found m = 8"]
    assert data["misses"] == ["cuda/triton"]
    assert data["facts"] == {"target": "cuda:sm90", "m": 8}
    assert choose(pinned("cuda/cutlass"), registry).to_dict()["chosen"] is None


def test_decision_kind_is_equal_when_only_numbers_differ():
    """`hwfuse.decisions()` has one record per kind, however many sizes arrive."""
    registry = make_registry(cuda__triton={"facts": ("m > 64",)})
    values = {"m": 9, "x": torch.zeros(9, 128)}
    call = Call(OP, NVIDIA, values, {"target": "cuda:sm90", "m": 9})
    assert _select.select(call, BUILT_IN, registry).kind == choose(BUILT_IN, registry).kind
    assert choose(listed("cuda/triton"), registry).kind != choose(BUILT_IN, registry).kind

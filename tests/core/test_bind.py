"""`op.bind`: decide once, freeze, check promises, pay nothing."""

from __future__ import annotations

import types

import pytest
import torch

import hwfuse
from hwfuse import _state
from hwfuse.testing._pretend import pretend

QUANT = hwfuse.op("fp8_group_quant")
X = torch.zeros(2, 128)
FN, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz


@pytest.fixture
def add(fakes):
    """Add an implementation that returns what it was called with."""

    def add(identifier, **requires):
        def function(  # a plain function, as in a file
            x, *, group_size=128, scale_layout="row", scale_format="fp32", dtype=None
        ):
            return identifier, group_size, scale_layout, dtype

        fakes.add(identifier, **requires).function = function
        return function

    return add


def test_bind_returns_a_plain_function_with_other_defaults(add):
    """Nothing stands between the caller and the implementation: same code, no wrapper."""
    function = add("acme/fast")
    bound = QUANT.bind(device="cpu", group_size=64, scale_layout="column")
    assert isinstance(bound, types.FunctionType)
    assert bound.__code__ is function.__code__
    assert bound(X) == ("acme/fast", 64, "column", FN)
    assert bound(X, scale_layout="row", dtype=FNUZ) == ("acme/fast", 64, "row", FNUZ)
    assert QUANT.using("acme/fast")(X) == ("acme/fast", 128, "row", FN)
    assert bound.decision.chosen == "acme/fast"
    assert bound.decision.facts["group_size"] == 64


def test_bind_of_the_reference_computes_as_the_op():
    """Result and gradient are the implementation's."""
    split = hwfuse.op("fused_qkvzba")
    inputs = split.spec.make_inputs(m=2, num_k_heads=1, num_v_heads=2, head_k_dim=8, head_v_dim=8)
    (qkvz, ba), options = split.spec.split(inputs)
    bound = split.bind(device="cpu", **options)
    qkvz.requires_grad_()
    for found, expected in zip(bound(qkvz, ba), split(qkvz, ba, **options), strict=True):
        assert torch.equal(found, expected)
    bound(qkvz, ba)[0].sum().backward()
    assert qkvz.grad is not None


def test_bind_is_frozen_against_later_policy(add):
    """`bound.decision` says what it is; nothing changes it."""
    add("acme/fast")
    bound = QUANT.bind(device="cpu")
    hwfuse.configure({"ops": {"fp8_group_quant": "reference/torch"}})
    with hwfuse.using("reference/torch"):
        assert bound(X)[0] == "acme/fast"
    assert bound.decision.origin == "built-in"
    assert QUANT.bind(device="cpu").decision.chosen == "reference/torch"


def test_bind_follows_the_policy_in_force(add):
    """`using`, configure and pins count when it is called."""
    add("acme/a")
    add("acme/b")
    with hwfuse.using(fp8_group_quant="acme/b"):
        bound = QUANT.bind(device="cpu")
    assert (bound(X)[0], bound.decision.origin) == ("acme/b", "hwfuse.using")


def test_bind_dtype_none_is_that_of_the_device(add):
    """Resolved once, also for a pretended one."""
    hwfuse.configure({"block": ["cuda", "rocm"]})  # theirs would come first
    add("acme/fast")
    with pretend("rocm:gfx942"):
        bound = QUANT.bind(device="cpu")
    assert bound(X)[3] == FNUZ
    assert bound.decision.pretended
    assert QUANT.bind(device="cpu", dtype=FNUZ)(X)[3] == FNUZ


def test_bind_without_a_promise_rejects_what_depends_on_it(add):
    """A fact that is not known yet is a reason; the next one is bound."""
    add("acme/small", facts=("m <= 64",))
    add("acme/any")
    bound = QUANT.bind(device="cpu")
    assert bound.decision.chosen == "acme/any"
    assert bound.decision.rejected["acme/small"] == ("not known yet whether m <= 64",)


def test_bind_promise_that_is_kept_runs_and_one_that_is_broken_raises(add):
    """What the chosen implementation relies on is checked on every call."""
    add("acme/small", facts=("m <= 64", "x.dtype == float32", "group_size == 128"))
    bound = QUANT.bind(device="cpu", m=1, dtypes={"x": torch.float32})
    assert bound.decision.chosen == "acme/small"
    assert bound(X)[0] == bound(torch.zeros(64, 128))[0] == "acme/small"
    for wrong, options, reason in (
        (torch.zeros(65, 128), {}, "needs m <= 64; found m = 65"),
        (X.half(), {}, "needs x.dtype == float32; found x.dtype = float16"),
        (X, {"group_size": 64}, "needs group_size == 128; found group_size = 64"),
    ):
        with pytest.raises(hwfuse.InputError) as error:
            bound(wrong, **options)
        text = f"fp8_group_quant: found {reason}, needed what was promised to bind"
        assert str(error.value) == text


def test_bind_promised_size_that_does_not_hold_is_a_reason(add):
    """A promise is looked at like a call."""
    add("acme/small", facts=("m <= 64",))
    bound = QUANT.bind(device="cpu", m=65)
    assert bound.decision.chosen == "reference/torch"
    assert bound.decision.rejected["acme/small"] == ("needs m <= 64; found m = 65",)


@pytest.mark.parametrize("fact", ["x.ndim == 1", "x.stride(0) == 1", "aligned(x, 16)"])
def test_bind_promised_dtype_says_nothing_else_of_the_tensor(fact, add):
    """Rank, strides and address are not known from a dtype."""
    add("acme/fast", facts=(fact,))
    bound = QUANT.bind(device="cpu", dtypes={"x": torch.float32})
    assert bound.decision.rejected["acme/fast"] == (f"not known yet whether {fact}",)


def test_bind_facts_that_speak_of_the_device_too_are_checked(add):
    """Arch and vendor are known; the rest is looked at when called."""
    add("acme/fast", facts=("(m <= 64) == (arch == cpu)", "vendor == 'cpu'"))
    bound = QUANT.bind(device="cpu", m=8)
    assert bound(X)[0] == "acme/fast"
    with pytest.raises(hwfuse.InputError, match="promised to bind"):
        bound(torch.zeros(65, 128))


def test_bind_rule_needs_its_promises(add):
    """A rule that looks at an unknown size cannot be answered."""
    add("acme/small")
    add("acme/large")
    rule = {"when": ["m <= 64"], "order": ["acme/small"]}
    hwfuse.configure({"ops": {"fp8_group_quant": {"order": ["acme/large"], "rules": [rule]}}})
    with pytest.raises(
        hwfuse.InputError, match=r"^bind: found name 'm' is not defined, needed a pr"
    ):
        QUANT.bind(device="cpu")
    assert QUANT.bind(device="cpu", m=1)(X)[0] == "acme/small"
    assert QUANT.bind(device="cpu", m=65)(X)[0] == "acme/large"
    rule["when"] = ["x.stride(0) == 1"]
    hwfuse.configure({"ops": {"fp8_group_quant": {"order": ["acme/large"], "rules": [rule]}}})
    for promised in ({}, {"dtypes": {"x": torch.float32}}):
        with pytest.raises(hwfuse.InputError, match=r"needed a promise of all that the rules"):
            QUANT.bind(device="cpu", **promised)


def test_bind_pin_and_miss_act_as_in_a_call(add):
    """A pin that cannot run is an error, a miss is what on_miss says."""
    add("acme/small", facts=("m <= 64",))
    with hwfuse.using("acme/small"), pytest.raises(hwfuse.PinnedUnavailable):
        QUANT.bind(device="cpu", m=65)
    hwfuse.configure({"ops": {"fp8_group_quant": ["acme/small"]}})
    with pytest.warns(hwfuse.HwfuseWarning, match="acme/small is missed"):
        QUANT.bind(device="cpu", m=65)
    hwfuse.configure({"on_miss": "error", "ops": {"fp8_group_quant": ["acme/small"]}})
    with pytest.raises(hwfuse.NoImplementation, match="acme/small was preferred"):
        QUANT.bind(device="cpu", m=65)


def test_bind_nothing_left_raises():
    """With all reasons, as a call."""
    hwfuse.configure({"block": ["reference"]})
    with pytest.raises(hwfuse.NoImplementation, match="nothing can take this call"):
        QUANT.bind(device="cpu")


@pytest.mark.parametrize(
    ("constants", "message"),
    [
        ({"x": X}, "x: found a tensor, needed no tensors: bind takes options and sizes"),
        ({"groupsize": 64}, "groupsize: found an unknown name, needed one of ('x', "),
        ({"dtypes": {"y": FN}}, "dtypes['y']: found an unknown name, needed one of ('x',)"),
    ],
)
def test_bind_wrong_constant_says_what_is_needed(constants, message):
    """Argument, found, needed."""
    with pytest.raises(hwfuse.InputError) as error:
        QUANT.bind(device="cpu", **constants)
    assert str(error.value).startswith(message)


def test_bind_still_validates_what_it_is_called_with():
    """`sizes` belongs to the implementation, so freezing cannot skip it."""
    bound = QUANT.bind(device="cpu")
    with pytest.raises(hwfuse.InputError, match=r"^x.shape: found \(128,\), needed 2 dimensions"):
        bound(X[0])


def test_bind_of_something_that_is_no_plain_function_says_so(fakes):
    """Defaults can be replaced in a function only."""
    implementation = fakes.add("acme/fast")
    implementation.function = torch.nn.Identity()
    with pytest.raises(
        TypeError, match=r"^Identity\(\) is not a plain function; an implementation"
    ):
        QUANT.bind(device="cpu")


def test_bind_leaves_no_trace_in_the_op(add):
    """It decides for itself."""
    add("acme/fast", facts=("m <= 64",))
    QUANT.bind(device="cpu", m=1)
    assert QUANT._memo[1] == {}
    assert _state.decisions == {}

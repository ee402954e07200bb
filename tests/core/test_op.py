"""The op object: calls, inputs of every kind, explain, misses, errors and gradients."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import re
import subprocess
import sys
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import hwfuse
from hwfuse import _cuda, _op, _spec
from hwfuse.testing._pretend import pretend

QUANT = hwfuse.op("fp8_group_quant")
SPLIT = hwfuse.op("fused_qkvzba")
X = torch.zeros(8, 256)
# Small calls for every op: sizes that make_inputs of its spec takes.
SMALL = {
    "fused_qkvzba": {"num_k_heads": 2, "num_v_heads": 4, "head_k_dim": 8, "head_v_dim": 8},
    "qkv_rms_norm": {"num_q_heads": 2, "num_kv_heads": 1, "head_dim": 16},
    "qkv_rms_norm_": {"num_q_heads": 2, "num_kv_heads": 1, "head_dim": 16},
    "fp8_group_quant": {"k": 256},
    "fp8_blockscale_gemm": {"n": 128, "k": 128},
    "w4a8_moe_prep": {"num_experts": 4},
    "fused_qkvbfg": {"hidden_size": 64, "num_heads": 2, "head_dim": 16},  # has no options
}


def call(op, **keywords):
    """Return the positional and keyword arguments of a small call."""
    arguments = op.spec.make_inputs(m=4, **SMALL[op.spec.name], **keywords)
    return op.spec.split(arguments)


def split_inputs(*, requires_grad=False):
    """Return the tensors and options of a small fused_qkvzba."""
    (qkvz, ba), options = call(SPLIT, dtype=torch.float32)
    return qkvz.requires_grad_(requires_grad), ba, options


class Wrapped(torch.Tensor):
    """A subclass with torch's own behaviour."""


class Holder(torch.Tensor):
    """A wrapper that unwraps in __torch_dispatch__ and keeps what it saw."""

    seen: ClassVar[list[str]] = []

    @staticmethod
    def __new__(cls, inner):
        """Wrap a tensor."""
        wrapper = cls._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        wrapper.inner = inner
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(str(func))
        return func(*(arg.inner for arg in args), **(kwargs or {}))


class Nodes(TorchDispatchMode):
    """Keeps the names of the nodes it sees."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


# The object


def test_op_unknown_name_suggests_and_lists():
    """A typo is told what it may have meant."""
    with pytest.raises(hwfuse.UnknownOp) as error:
        hwfuse.op("fp8_group_quan")
    start = "no op is called 'fp8_group_quan' (did you mean 'fp8_group_quant'?); ops: "
    assert str(error.value) == start + ", ".join(hwfuse.op_names())


def test_op_names_are_the_spec_files():
    """An op is found by its file's name."""
    assert set(hwfuse.op_names()) >= SMALL.keys()


def test_op_copies_and_pickles_are_the_one_op_of_that_name():
    """There is one object per name."""
    for other in (
        hwfuse.op("fp8_group_quant"),
        copy.copy(QUANT),
        copy.deepcopy({"a": QUANT})["a"],
        pickle.loads(pickle.dumps(QUANT)),  # noqa: S301
    ):
        assert other is QUANT


@pytest.mark.parametrize("name", SMALL)
def test_op_has_its_specs_signature_and_docstring(name):
    """`help(op)` shows the contract."""
    op = hwfuse.op(name)
    spec = _spec.load(name).function
    parameters = [p.replace(annotation=p.empty) for p in inspect.signature(op).parameters.values()]
    expected = [p.replace(annotation=p.empty) for p in inspect.signature(spec).parameters.values()]
    assert parameters == expected
    assert type(op).__call__.__doc__ == spec.__doc__
    assert repr(op) == f"hwfuse.op({name!r})"


def test_op_shows_its_spec_and_node():
    """What tools read: names, dimensions, schema, the torch overload."""
    spec = QUANT.spec
    assert (spec.name, spec.tensors, spec.positional) == ("fp8_group_quant", ("x",), ("x",))
    assert spec.dims == {"x": ("m", "k")}
    assert spec.size_names == ("m", "k", "num_groups")
    assert spec.schema == (
        '(Tensor x, *, SymInt group_size=128, str scale_layout="row", '
        'str scale_format="fp32", ScalarType? dtype=None) -> (Tensor, Tensor)'
    )
    assert QUANT.node is torch.ops.hwfuse.fp8_group_quant.default
    assert hwfuse.op("qkv_rms_norm_").spec.mutates == ("q", "k", "v")


@pytest.mark.parametrize("name", SMALL)
def test_op_on_the_cpu_runs_the_reference(name):
    """Without accelerator and settings every op works."""
    op = hwfuse.op(name)
    args, kwargs = call(op)
    with hwfuse.record() as record:
        op(*args, **kwargs)
    assert record.calls == {(name, "reference/torch"): 1}


def test_tensors_may_be_named_and_options_may_not_be_positional():
    """Tensors are positional or named; the rest is keyword-only."""
    QUANT(x=X)
    with pytest.raises(TypeError, match="takes 2 positional arguments but 3 were given"):
        QUANT(X, 128)
    with pytest.raises(TypeError, match="unexpected keyword argument 'group'"):
        QUANT(X, group=128)


# Inputs


@pytest.mark.parametrize("is_warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0], "x: found a list, needed a torch.Tensor"),
        (None, "x: found a NoneType, needed a torch.Tensor"),
        (np.zeros((2, 128)), "x: found a ndarray, needed a torch.Tensor"),
        (1.5, "x: found a float, needed a torch.Tensor"),
        (X.to_sparse(), "x.layout: found torch.sparse_coo, needed a dense tensor"),
        (X[0], "x.shape: found (256,), needed 2 dimensions"),
        (torch.tensor(1.0), "x.shape: found (), needed 2 dimensions"),
        (X[None], "x.shape: found (1, 8, 256), needed 2 dimensions"),
        (X.int(), "x.dtype: found torch.int32, needed torch.bfloat16 or"),
        (X.t(), "x.stride(-1): found 256 (shape (256, 8), strides (1, 256)), needed 1:"),
        (X[:, :100], "x.shape[1]: found 100, needed a positive multiple of group_size = 128"),
    ],
)
def test_wrong_tensor_is_a_value_error_that_names_it(value, message, is_warm, fakes):
    """Argument, found, needed; the same before and after calls were memoised on facts."""
    fakes.add("acme/fast", facts=("k <= 128", "m <= 4", "x.stride(0) == 8", "aligned(x, 16)"))
    if is_warm:
        QUANT(X)
    with pytest.raises(hwfuse.InputError) as error:
        QUANT(value)
    assert str(error.value).startswith(message)
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize("is_warm", [False, True], ids=["cold", "warm"])
def test_wrong_option_is_a_value_error_that_names_it(is_warm, fakes):
    """Also one that no key of a memo table can hold."""
    fakes.add("acme/fast", facts=("scale_layout == 'column'", "num_groups == 77"))
    if is_warm:
        QUANT(X)
    for wrong in ("colum", ["row"]):
        with pytest.raises(hwfuse.InputError, match=r"^scale_layout: found .*, needed 'row' or"):
            QUANT(X, scale_layout=wrong)


def test_wrong_tensor_through_the_node_is_named_too(fakes):
    """Compiled code and subclasses come this way."""
    fakes.add("acme/fast", facts=("k <= 128",))
    QUANT.node(X, dtype=torch.float8_e4m3fn)
    with pytest.raises(hwfuse.InputError, match=r"^x.shape: found \(256,\), needed 2 dimensions"):
        QUANT.node(X[0], dtype=torch.float8_e4m3fn)


def test_parameter_is_as_good_as_a_tensor(fakes):
    """`torch.nn.Parameter` stays in the eager path."""
    fakes.add("acme/fast")
    with torch.no_grad():
        QUANT(torch.nn.Parameter(X))
    assert fakes.ran == ["acme/fast"]


def test_tensor_subclass_becomes_one_node_and_does_not_recur():
    """A subclass goes through torch, which knows what to do with it."""
    expected = QUANT(X)
    with Nodes() as nodes:
        found = QUANT(X.as_subclass(Wrapped))
    assert nodes.names.count("hwfuse.fp8_group_quant.default") == 1
    assert torch.equal(found[1], expected[1])


def test_wrapper_subclass_sees_one_node_and_its_content_runs(fakes):
    """DTensor and its like decide what to do with the op."""
    fakes.add("acme/fast")
    Holder.seen.clear()
    assert type(QUANT(Holder(X))[0]) is torch.Tensor
    assert Holder.seen == ["hwfuse.fp8_group_quant.default"]
    assert fakes.ran == ["acme/fast"]


def test_dispatch_mode_sees_exactly_one_node():
    """Profilers and tracers see the op, not what is inside."""
    with Nodes() as nodes:
        QUANT(X)
    assert nodes.names == ["hwfuse.fp8_group_quant.default"]


def test_fake_tensor_gives_the_contracts_format():
    """Fakes are answered by `outputs`: dtype, shape and strides, no kernel."""
    with FakeTensorMode() as mode:
        inside = QUANT(torch.empty(6, 256), scale_layout="column_tma")
    outside = QUANT(mode.from_tensor(torch.empty(6, 256)), scale_layout="column_tma")
    for q, scale in (inside, outside):
        assert isinstance(scale, FakeTensor)
        assert (q.dtype, q.shape, q.stride()) == (torch.float8_e4m3fn, (6, 256), (256, 1))
        assert (scale.dtype, scale.shape, scale.stride()) == (torch.float32, (6, 2), (1, 8))


@pytest.mark.parametrize("name", SMALL)
def test_meta_tensors_give_meta_results_in_the_contracts_format(name):
    """Shapes can be asked for without memory."""
    op = hwfuse.op(name)
    op(*call(op)[0], **call(op)[1])  # warm: meta tensors must not meet the CPU's choice
    args, kwargs = call(op, device="meta")
    found, expected = op(*args, **kwargs), op.spec.outputs(*args, **kwargs)
    for one, other in zip(_tuple(found), _tuple(expected), strict=True):
        assert one.is_meta
        assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())


@pytest.mark.parametrize("is_warm", [False, True], ids=["cold", "warm"])
def test_meta_tensor_when_pretending_does_not_reach_the_kernel(is_warm, fakes):
    """A kernel would read its address, which is 0."""
    fakes.add("acme/fast")
    with pretend("cuda:sm90"):
        if is_warm:
            QUANT(X)
            fakes.ran.clear()
        assert QUANT(X.to("meta"))[0].is_meta
    assert fakes.ran == []


def _tuple(results):
    return results if isinstance(results, tuple) else () if results is None else (results,)


# Explain


@pytest.mark.parametrize("device", ["cpu", "cuda:sm90", "cuda:sm120", "rocm:gfx942", "rocm:gfx950"])
@pytest.mark.parametrize("name", SMALL)
def test_explain_answers_for_hardware_that_is_not_here(name, device):
    """Every op, every vendor, from any machine; the answer is JSON."""
    decision = hwfuse.explain(name, m=4, **SMALL[name], device=device)
    assert decision.chosen
    assert decision.facts["target"] == device
    assert decision.facts["m"] == 4
    assert decision.pretended is (device != "cpu")
    data = decision.to_dict()
    assert json.loads(json.dumps(data)) == data


def test_explain_of_the_issue_prints_reasons():
    """The command of the issue, as a call."""
    decision = hwfuse.explain("fp8_blockscale_gemm", device="rocm:gfx950", m=64, n=7168, k=2048)
    assert decision.chosen == "rocm/aiter"
    assert decision.rejected["cuda/deepgemm"]
    assert (decision.facts["m"], decision.facts["n"], decision.facts["k"]) == (64, 7168, 2048)
    assert "fp8_blockscale_gemm on rocm:gfx950 (pretended), order from built-in" in str(decision)


def test_explain_dtype_none_is_that_of_the_asked_device():
    """gfx942 computes with the fnuz flavour, whatever this machine has."""
    facts = hwfuse.explain("fp8_group_quant", device="rocm:gfx942").facts
    assert facts["dtype"] == "float8_e4m3fnuz"
    assert hwfuse.explain("fp8_group_quant", device="cuda:sm90").facts["dtype"] == "float8_e4m3fn"


def test_explain_real_call_is_the_decision_of_that_call_and_runs_nothing(fakes):
    """With tensors, arguments are those of the call."""
    fakes.add("acme/fast", facts=("m <= 4",))
    decision = hwfuse.explain("fp8_group_quant", X, scale_layout="column")
    assert decision.rejected["acme/fast"] == ("needs m <= 4; found m = 8",)
    assert decision.facts["x.dtype"] == "float32"
    assert decision.facts["scale_layout"] == "column"
    assert hwfuse.explain("fp8_group_quant", x=X[:4]).chosen == "acme/fast"
    assert fakes.ran == []
    assert hwfuse.decisions() == []


@pytest.mark.parametrize(
    ("args", "keywords", "message"),
    [
        ((X,), {"device": "cuda:sm90"}, "device: found 'cuda:sm90', needed none beside tensors"),
        (([1.0],), {}, "x: found a list, needed a torch.Tensor"),
        ((), {"device": "h200"}, "device: found 'h200', needed 'cpu', 'cuda:sm90' or"),
        ((), {"device": "rocm"}, "device: found 'rocm', needed 'cpu', 'cuda:sm90' or"),
        ((), {"device": "cuda:gfx942"}, "device: found 'cuda:gfx942', needed 'cpu', 'cuda:sm90'"),
        ((), {"tokens": 4}, "fp8_group_quant.make_inputs: found "),
        ((), {"k": 100}, "fp8_group_quant.make_inputs: found "),
        ((), {"scale_layout": "rows"}, "scale_layout: found 'rows', needed 'row' or"),
    ],
)
def test_explain_wrong_question_says_what_is_needed(args, keywords, message):
    """Argument, found, needed."""
    with pytest.raises(hwfuse.InputError) as error:
        hwfuse.explain("fp8_group_quant", *args, **keywords)
    assert str(error.value).startswith(message)


def test_explain_gpu_of_this_machine_without_one_says_how_to_ask(monkeypatch):
    """``cuda`` means a GPU that is here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "cuda:0"):
        with pytest.raises(hwfuse.InputError, match=r"^device: found 'cuda.*, but no GPU, needed"):
            hwfuse.explain("fp8_group_quant", device=device)


def test_explain_when_pretending_is_of_the_pretended_device():
    """Without a device it answers for the one in force, and says that it is pretended."""
    with pretend("rocm:gfx942"):
        decision = hwfuse.explain("fp8_group_quant", k=256)
        assert (decision.facts["target"], decision.pretended) == ("rocm:gfx942", True)
        assert hwfuse.explain("fp8_group_quant", device="cpu").pretended is False
        assert hwfuse.explain("fp8_group_quant", X).pretended is True


# Misses, pins, errors


def test_pin_that_cannot_run_raises_with_the_decision_and_the_command(fakes):
    """Whatever on_miss says."""
    fakes.add("acme/fast", facts=("m <= 4",))
    hwfuse.configure({"on_miss": "silent"})
    with pytest.raises(hwfuse.PinnedUnavailable) as error:
        QUANT.using("acme/fast")(X)
    lines = str(error.value).splitlines()
    assert lines[0] == "acme/fast is pinned by op.using and cannot take this call"
    assert "  rejected  acme/fast        needs m <= 4; found m = 8" in lines
    assert lines[-1] == "more: python -m hwfuse explain fp8_group_quant"
    assert error.value.decision.rejected["acme/fast"]
    again = pickle.loads(pickle.dumps(error.value))  # noqa: S301 - errors cross processes
    assert (str(again), again.decision) == (str(error.value), error.value.decision)


def test_miss_warns_once_per_process_at_the_callers_line(fakes):
    """The default: the next one runs, and the user is told once, where the call is."""
    fakes.add("acme/fast", facts=("m <= 4",))
    hwfuse.configure({"ops": {"fp8_group_quant": ["acme/fast"]}})
    with pytest.warns(hwfuse.HwfuseWarning) as warnings:
        QUANT(X)
    (text,) = [str(warning.message) for warning in warnings]
    assert text == (
        "fp8_group_quant: acme/fast is missed, reference/torch runs: needs m <= 4; found m = 8. "
        "more: python -m hwfuse explain fp8_group_quant"
    )
    assert warnings[0].filename == __file__
    QUANT(X)  # a second warning would be an error
    with hwfuse.record():
        QUANT(torch.zeros(9, 128))


def test_miss_when_it_is_an_error_raises_every_time(fakes):
    """on_miss: error; origin and decision are in the text; nothing runs."""
    fakes.add("acme/fast", facts=("m <= 4",))
    fakes.add("acme/slow")
    order = ["acme/fast", "acme/slow"]
    hwfuse.configure({"on_miss": "error", "ops": {"fp8_group_quant": order}})
    for _ in range(2):
        with pytest.raises(hwfuse.NoImplementation) as error:
            QUANT(X)
        text = "acme/fast was preferred and cannot run (on_miss, hwfuse.configure)\n"
        assert str(error.value).startswith(text)
    assert fakes.ran == []
    QUANT(X[:4])
    assert fakes.ran == ["acme/fast"]


def test_miss_when_silent_says_nothing(fakes):
    """on_miss: silent."""
    fakes.add("acme/fast", facts=("m <= 4",))
    hwfuse.configure({"on_miss": "silent", "ops": {"fp8_group_quant": ["acme/fast"]}})
    QUANT(X)  # warnings are errors
    assert hwfuse.decisions()[0].misses == ("acme/fast",)


def test_nothing_left_raises_with_all_reasons():
    """Without the reference there may be nothing."""
    hwfuse.configure({"block": ["reference"]})
    with pytest.raises(hwfuse.NoImplementation) as error:
        QUANT(X)
    lines = str(error.value).splitlines()
    assert lines[0] == "nothing can take this call"
    reason = "backend reference is blocked by hwfuse.configure"
    assert f"  rejected  reference/torch  {reason}" in lines


def test_exception_of_a_running_implementation_propagates_and_no_other_runs(fakes):
    """Fallback happens before the launch, from facts; never by catching."""

    def fails(*args, **kwargs):
        raise RuntimeError("illegal address")

    fakes.add("acme/fast", function=fails)
    fakes.add("acme/slow")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"^illegal address$"):
            QUANT(X)
    assert fakes.ran == ["acme/fast", "acme/fast"]


def test_bug_in_a_fact_raises_and_is_no_refusal(fakes):
    """A predicate that fails is a bug to be seen."""
    fakes.add("acme/fast", facts=("x.shape[2] == 1",))
    for _ in range(2):
        with pytest.raises(IndexError):
            QUANT(X)


def test_using_several_ids_is_an_order_and_none_is_an_error(fakes):
    """`op.using` takes what `hwfuse.using` takes."""
    fakes.add("acme/fast", facts=("m <= 4",))
    fakes.add("acme/slow")
    QUANT.using("acme/fast", "acme/slow")(X[:4])
    QUANT.using("acme/slow", "acme/fast")(x=X)
    QUANT.using(["acme/fast", "acme/slow"])(X[:4])
    assert fakes.ran == ["acme/fast", "acme/slow", "acme/fast"]
    with pytest.raises(hwfuse.ConfigError, match=r"^hwfuse.using: found None, needs an id or a l"):
        hwfuse.using(fp8_group_quant=None).__enter__()
    with pytest.raises(hwfuse.ConfigError, match=r"^op.using: found \(\), needs an id or a list"):
        QUANT.using()(X)


def test_reference_on_an_accelerator_is_announced_once(monkeypatch):
    """Landing on the slow one there is worth a word; on the CPU it is not."""
    hwfuse.configure({"block": ["cuda", "rocm"]})  # they have faster ones
    monkeypatch.setattr(_op._device, "target_of", lambda _: _op.Target("amd", "gfx950"))
    with pytest.warns(hwfuse.HwfuseWarning, match=r"^fp8_group_quant runs the reference on rocm:g"):
        QUANT(X)
    QUANT(torch.zeros(8, 128, dtype=torch.float16))


def test_reference_on_an_accelerator_when_the_user_named_it_is_not_announced(monkeypatch):
    """Who asks for it need not be told."""
    monkeypatch.setattr(_op._device, "target_of", lambda _: _op.Target("amd", "gfx950"))
    with hwfuse.using("reference/torch"):
        QUANT(X)


def test_cold_call_in_a_capture_is_refused(monkeypatch):
    """Choosing and compiling cannot happen there."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(hwfuse.ColdCallInCapture) as error:
        _cuda.refuse_capture("fp8_group_quant")
    assert str(error.value) == (
        "first call of fp8_group_quant of its kind inside a CUDA graph capture; choosing and "
        "compiling cannot happen there: call it once before, or "
        "hwfuse.warmup('fp8_group_quant', …)"
    )
    QUANT(X)  # on the CPU nothing is captured


# Gradients


def test_implementation_without_gradient_is_refused_when_one_is_needed(fakes):
    """In eager mode, for an op that has a gradient: the differentiable one runs."""
    fakes.add("acme/fast", "fused_qkvzba")
    qkvz, ba, options = split_inputs(requires_grad=True)
    mixed_qkv, z, _, _ = SPLIT(qkvz, ba, **options)
    (mixed_qkv.sum() + 2 * z.sum()).backward()
    assert fakes.ran == []
    assert set(qkvz.grad.unique().tolist()) == {1.0, 2.0}
    reason = ("a gradient is needed and it is not differentiable",)
    assert hwfuse.explain("fused_qkvzba", qkvz, ba, **options).rejected["acme/fast"] == reason
    with torch.no_grad():
        SPLIT(qkvz, ba, **options)
    SPLIT(qkvz.detach(), ba, **options)
    with torch.inference_mode():
        SPLIT(qkvz, ba, **options)
    assert fakes.ran == ["acme/fast"] * 3


def test_gradient_toggled_on_one_tensor_changes_the_choice_each_time(fakes):
    """requires_grad of any tensor is looked at on every call."""
    fakes.add("acme/fast", "fused_qkvzba")
    fakes.add("acme/trains", "fused_qkvzba", differentiable=True)
    hwfuse.configure({"ops": {"fused_qkvzba": ["acme/fast", "acme/trains"]}})
    qkvz, ba, options = split_inputs()
    SPLIT(qkvz, ba, **options)
    ba.requires_grad_()
    with pytest.warns(hwfuse.HwfuseWarning, match="acme/fast is missed"):
        SPLIT(qkvz, ba, **options)
    ba.requires_grad_(requires_grad=False)
    SPLIT(qkvz, ba, **options)
    ba.requires_grad_()
    SPLIT(qkvz, ba, **options)
    fast, trains = "acme/fast", "acme/trains"
    assert fakes.ran == [fast, trains, fast, trains]


@pytest.mark.parametrize("is_warm", [False, True], ids=["cold", "warm"])
def test_op_without_gradient_runs_forward_and_raises_in_backward(is_warm, fakes):
    """Inference needs no `no_grad`; training is told which op."""
    fakes.add("acme/fast")
    x = X.clone().requires_grad_()
    if is_warm:
        QUANT(X)
        QUANT(x)
    _, scale = QUANT(x)
    assert fakes.ran[-1] == hwfuse.explain("fp8_group_quant", x).chosen == "acme/fast"
    with pytest.raises(
        NotImplementedError, match=r"^fp8_group_quant has no gradient: it is for inf"
    ):
        scale.sum().backward()


def test_functorch_gradient_takes_the_differentiable_implementation(fakes):
    """Its wrapped tensors look plain, and need a gradient."""
    fakes.add("acme/fast", "fused_qkvzba")
    qkvz, ba, options = split_inputs()
    gradient = torch.func.grad(lambda x: SPLIT(x, ba, **options)[0].sum())(qkvz)
    assert fakes.ran == []
    assert set(gradient.unique().tolist()) == {0.0, 1.0}


def test_op_on_integers_needs_no_gradient():
    """Nothing of w4a8_moe_prep can require one."""
    op = hwfuse.op("w4a8_moe_prep")
    args, kwargs = call(op)
    assert not any(result.requires_grad for result in op(*args, **kwargs))


def test_node_has_the_references_gradient(fakes):
    """Whatever ran forward: the reference's own autograd, recomputed."""
    fakes.add("acme/fast", "fused_qkvzba")
    qkvz, ba, options = split_inputs(requires_grad=True)
    expected = torch.autograd.grad(_loss(SPLIT(qkvz, ba, **options)), qkvz)[0]
    with hwfuse.using("reference/torch"):
        found = torch.autograd.grad(_loss(SPLIT.node(qkvz, ba, **options)), qkvz)[0]
    assert torch.equal(found, expected)
    results = SPLIT.node(qkvz, ba, **options)
    assert fakes.ran == ["acme/fast"]
    torch.autograd.grad(results[1].sum(), qkvz)  # one result of four


def _loss(results):
    return sum((result * torch.arange(result.numel()).view_as(result)).sum() for result in results)


def test_second_derivative_through_the_node_is_not_silently_zero():
    """Right, or an error; a missing graph would be a wrong number."""
    op = hwfuse.op("qkv_rms_norm")
    args, kwargs = call(op, dtype=torch.float32)
    q = args[0].clone().requires_grad_()

    def second(function):
        (first,) = torch.autograd.grad(
            function(q, *args[1:], **kwargs)[0].sum(), q, create_graph=True
        )
        return torch.autograd.grad(first.sum(), q)[0]

    torch.testing.assert_close(second(op.node), second(op))


@pytest.mark.parametrize("is_node", [False, True], ids=["eager", "node"])
def test_in_place_op_refuses_a_gradient_and_says_what_to_use(is_node):
    """It writes into its inputs."""
    op = hwfuse.op("qkv_rms_norm_")
    args, kwargs = call(op)
    args[3].requires_grad_()
    with pytest.raises(NotImplementedError) as error:
        (op.node if is_node else op)(*args, **kwargs)
    assert str(error.value) == (
        "qkv_rms_norm_ writes into its inputs and has no gradient; "
        "use qkv_rms_norm, or torch.no_grad()"
    )
    with torch.no_grad():
        (op.node if is_node else op)(*args, **kwargs)
    with torch.inference_mode():
        op(*call(op)[0], **kwargs)


@pytest.mark.parametrize("is_node", [False, True], ids=["eager", "node"])
def test_in_place_op_tells_autograd_that_a_saved_tensor_changed(is_node, fakes):
    """A kernel that writes behind torch's back would give a wrong gradient."""
    op = hwfuse.op("qkv_rms_norm_")
    fakes.add("acme/fast", op.spec.name, function=lambda *_, **__: None)
    args, kwargs = call(op)
    weight = torch.ones_like(args[0], requires_grad=True)
    product = weight * args[0]  # saves q
    (op.node if is_node else op)(*args, **kwargs)
    assert fakes.ran == ["acme/fast"]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_broken_implementation_names_id_and_file(plugins):
    """A file that cannot be imported is an error when chosen, and nothing else runs."""
    source = _quant_file("raise OSError('libfast.so: no such file')")
    plugins.install(
        "acme", BACKEND, {"fast_ops/__init__.py": "", f"fast_ops/{QUANT.spec.name}.py": source}
    )
    path = plugins.folder / "hwfuse_acme" / "fast_ops" / "fp8_group_quant.py"
    text = f"acme/fast was chosen for fp8_group_quant but {path} cannot be used: OSError("
    for _ in range(2):
        with pytest.raises(hwfuse.BrokenImplementation, match="^" + re.escape(text)):
            QUANT(X)


BACKEND = """
    import hwfuse

    @hwfuse.hookimpl
    def hwfuse_backend():
        return hwfuse.Backend("acme", "hwfuse_acme", None, {"fast": ()})
    """


def _quant_file(body):
    return f"""
    import torch
    from torch import Tensor

    REQUIRES = {{}}

    {body}

    def fp8_group_quant(
        x: Tensor, *, group_size: int = 128, scale_layout: str = "row",
        scale_format: str = "fp32", dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        return x, x
    """


def test_warnings_as_errors_in_a_fresh_process_are_none():
    """A first call on the CPU says nothing at all."""
    code = "import torch, hwfuse; print(hwfuse.op('fp8_group_quant')(torch.zeros(2, 128))[0].dtype)"
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("torch.float8_e4m3fn\n", "")

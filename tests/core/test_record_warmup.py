"""`hwfuse.record` counts what runs; `hwfuse.warmup` decides and compiles before it matters."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch

import hwfuse

QUANT = hwfuse.op("fp8_group_quant")
SPLIT = hwfuse.op("fused_qkvzba")
X = torch.zeros(2, 128)
FAST = ("fp8_group_quant", "acme/fast")
REFERENCE = ("fp8_group_quant", "reference/torch")


def test_record_counts_calls_by_op_and_implementation(fakes):
    """Also those of ops that were warm, through the node, and in other threads."""
    fakes.add("acme/fast", facts=("m <= 64",))
    QUANT(X)
    with hwfuse.record() as record:
        for m in (1, 2, 65):
            QUANT(torch.zeros(m, 128))
        QUANT.node(X, dtype=torch.float8_e4m3fn)
        thread = threading.Thread(target=QUANT, args=(X,))
        thread.start()
        thread.join()
        QUANT.using("reference/torch")(X)
    QUANT(X)
    assert record.calls == {FAST: 4, REFERENCE: 2}


def test_record_keeps_one_decision_per_kind(fakes):
    """Facts that arrive later rebuild the table, but do not repeat decisions."""
    fakes.add("acme/fast", facts=("m <= 64",))
    with hwfuse.record() as outer:
        QUANT(X)
        with hwfuse.record() as inner:
            QUANT(X)
            QUANT(torch.zeros(3, 128))
        QUANT(torch.zeros(65, 128))
    assert [d.chosen for d in inner.decisions] == ["acme/fast"]
    assert [d.chosen for d in outer.decisions] == ["acme/fast", "reference/torch"]
    assert (inner.calls, outer.calls) == ({FAST: 2}, {FAST: 3, REFERENCE: 1})


def test_record_restores_the_hot_path(fakes):
    """After the block the table holds the implementation itself, no counter."""
    function = fakes.add("acme/fast").load()
    with hwfuse.record():
        QUANT(X, dtype=torch.float8_e4m3fn)
        assert function not in QUANT._memo[1].values()
    QUANT(X, dtype=torch.float8_e4m3fn)
    assert list(QUANT._memo[1].values()) == [function]


def test_record_when_the_block_raises_restores_too(fakes):
    """The end is the end."""
    function = fakes.add("acme/fast").load()
    with contextlib.suppress(ZeroDivisionError), hwfuse.record() as record:
        QUANT(X, dtype=torch.float8_e4m3fn)
        raise ZeroDivisionError
    QUANT(X, dtype=torch.float8_e4m3fn)
    assert record.calls == {FAST: 1}
    assert list(QUANT._memo[1].values()) == [function]


def test_record_counts_a_call_that_raises(fakes):
    """It ran."""
    fakes.add("acme/fast", function=lambda *_, **__: 1 // 0)
    with pytest.raises(ZeroDivisionError), hwfuse.record() as record:
        QUANT(X)
    assert record.calls == {FAST: 1}


def test_record_of_in_place_and_differentiable_ops(fakes):
    """Every way to the implementation is counted."""
    inputs = SPLIT.spec.make_inputs(m=2, num_k_heads=1, num_v_heads=1, head_k_dim=8, head_v_dim=8)
    args, kwargs = SPLIT.spec.split(inputs)
    args[0].requires_grad_()
    norm = hwfuse.op("qkv_rms_norm_")
    inputs = norm.spec.make_inputs(m=2, num_q_heads=1, num_kv_heads=1, head_dim=8)
    with hwfuse.record() as record:
        SPLIT(*args, **kwargs)
        norm(*norm.spec.split(inputs)[0], head_dim=8)
    assert record.calls == {
        ("fused_qkvzba", "reference/torch"): 1,
        ("qkv_rms_norm_", "reference/torch"): 1,
    }


def test_warmup_runs_every_combination_and_returns_its_decision(fakes):
    """A list stands for each of its values."""
    fakes.add("acme/fast", facts=("m <= 64",))
    decisions = hwfuse.warmup("fp8_group_quant", m=[1, 65], k=[128, 256], device="cpu")
    found = [(d.chosen, d.facts["m"], d.facts["k"]) for d in decisions]
    fast, slow = "acme/fast", "reference/torch"
    assert found == [(fast, 1, 128), (fast, 1, 256), (slow, 65, 128), (slow, 65, 256)]
    assert fakes.ran == [fast, fast]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QUANT, "decide", lambda *_: pytest.fail("cold"), raising=True)
        with torch.no_grad():
            QUANT(torch.zeros(7, 512, dtype=torch.bfloat16))


def test_warmup_takes_dtype_and_options_of_make_inputs():
    """Its keywords are those of the spec's make_inputs."""
    (decision,) = hwfuse.warmup(
        "fp8_group_quant", dtype=torch.float16, k=128, scale_layout="column", device="cpu"
    )
    assert decision.facts["x.dtype"] == "float16"
    assert decision.facts["scale_layout"] == "column"


def test_warmup_unknown_size_is_an_input_error():
    """Argument, found, needed."""
    with pytest.raises(hwfuse.InputError, match=r"^fp8_group_quant.make_inputs: found .*'tokens'"):
        hwfuse.warmup("fp8_group_quant", tokens=4, device="cpu")
    with pytest.raises(hwfuse.UnknownOp):
        hwfuse.warmup("fp8_quant")

"""``hwfuse demo``: every claim on its screen is checked, and the checks can fail."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch

import hwfuse
from hwfuse import testing
from hwfuse._cli import demo
from hwfuse.ops import fused_qkvzba as spec

transformers = pytest.importorskip("transformers", reason="the demo runs a model of transformers")

SECTIONS = (
    "_flip_by_yaml",
    "_wrong_implementation",
    "_other_hardware",
    "_interpreted",
    "_more_families",
    "_fp8_checkpoint",
)


def fused_qkvzba(qkvz, ba, *, head_k_dim, head_v_dim, layout="interleaved"):
    """Do the same as the reference, by a route of its own."""
    mixed_qkv, z, a, b = demo._swapped(
        qkvz, ba, head_k_dim=head_k_dim, head_v_dim=head_v_dim, layout=layout
    )
    return mixed_qkv, z, b, a


def test_demo_holds_with_an_outside_implementation(run):
    """With the example plugin there, YAML flips the op to it and everything holds."""
    named_only = {"experimental": True}
    with testing.implementation("fused_qkvzba", "acme/memory", fused_qkvzba, requires=named_only):
        result = run("demo")
    assert result.code == 0, result.out
    assert "FAILED" not in result.out
    assert "ok     largest difference of the logits: 0.0" in result.out
    assert "     fused_qkvzba: acme/memory" in result.out
    assert "ok     acme/memory ran instead of reference/torch\n" in result.out
    assert "output b: every bit must arrive" in result.out
    for name in ("Qwen3.5", "Gemma 4", "Kimi Linear"):
        assert f"ok     {name}: the same tokens; logits differ by" in result.out
    assert "ok     Kimi Linear: fused_qkvbfg 32x, in 16 passes" in result.out
    assert "ok     fp8_blockscale_gemm 384x, in 16 passes" in result.out


def test_demo_without_the_example_says_how_to_install_it(capsys, monkeypatch):
    """Without the plugin that part is left out, with the command."""
    monkeypatch.setattr(demo, "_EXAMPLE", "nobody")
    model = SimpleNamespace(sizes=dict, prompt=torch.zeros(1))
    demo._flip_by_yaml(demo._Show(), model)
    assert "pip install --no-build-isolation --no-deps ./examples/hwfuse-acme" in (
        capsys.readouterr().out
    )


def test_demo_false_claim_fails(run, monkeypatch):
    """A claim that does not hold is marked, repeated at the end, and is the exit code."""
    monkeypatch.setattr(demo, "_calls", lambda _model: 47)
    for section in SECTIONS:
        monkeypatch.setattr(demo, section, lambda *_: None)  # they take seconds
    result = run("demo")
    assert result.code == 1
    assert "   FAILED 47 calls: one per linear attention layer and new token" in result.out
    assert result.out.endswith(
        "1 of 4 checks failed: 47 calls: one per linear attention layer and new token\n"
    )


def test_demo_of_a_family_that_a_wrong_op_serves_fails(capsys, monkeypatch):
    """Both claims can fail: the count of calls, and the tokens."""
    show = demo._Show()
    gate = hwfuse.op("fused_qkvbfg").using("reference/torch")

    def swapped(x, w_qkvbfg, w_fg):
        return gate(x, w_qkvbfg, w_fg.flip(0))

    monkeypatch.setattr(
        demo, "_MORE", (("Kimi Linear", "tiny_kimi_linear", {}, {"fused_qkvbfg": 3}),)
    )
    with (
        testing.implementation("fused_qkvbfg", "acme/swapped", swapped),
        hwfuse.using(fused_qkvbfg="acme/swapped"),
    ):
        demo._more_families(show, "cpu")
    assert len(show.failed) == 2, capsys.readouterr().out


def test_demo_of_a_checkpoint_that_a_wrong_op_serves_fails(capsys):
    """Scales that are not used make the right order as wrong as another one."""
    show = demo._Show()
    product = hwfuse.op("fp8_blockscale_gemm").using("reference/torch")

    def unscaled(a, a_scale, b, b_scale, *, out_dtype=torch.bfloat16):
        return product(a, a_scale, b, torch.ones_like(b_scale), out_dtype=out_dtype)

    with (
        testing.implementation("fp8_blockscale_gemm", "acme/unscaled", unscaled),
        hwfuse.using(fp8_blockscale_gemm="acme/unscaled"),
    ):
        demo._fp8_checkpoint(show, "cpu")
    assert len(show.failed) == 1, capsys.readouterr().out
    assert "the right ones were used" in show.failed[0]


def test_demo_leaves_settings_aside(settings):
    """A user's own settings do not change what the screen claims, and are there again after it."""
    settings(HWFUSE_USE="*=reference/torch")
    with demo._no_settings():
        assert hwfuse.explain("fused_qkvzba", device="cuda:sm90").origin == "built-in"
    assert hwfuse.explain("fused_qkvzba", device="cuda:sm90").origin == "HWFUSE_USE"


def test_demo_without_transformers_says_what_to_install(run, monkeypatch):
    """A missing library is one message with the command."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    result = run("demo")
    assert result.code == 1
    assert result.err == (
        "hwfuse demo: the demo needs transformers, which is not installed here: "
        "pip install 'hwfuse[transformers]'\n"
    )


def test_swapped_differs_from_the_reference_in_b_and_a_only():
    """The deliberately wrong implementation is wrong in one thing: what parity must find."""
    arguments = spec.make_inputs(m=3, num_k_heads=2, num_v_heads=4, head_k_dim=8, head_v_dim=8)
    with testing.implementation("fused_qkvzba", "acme/memory", fused_qkvzba):
        report = testing.run(["fused_qkvzba"], ["acme"], "cpu")
    assert [line.failed for line in report.lines.values()] == [{}]
    right, wrong = fused_qkvzba(**arguments), demo._swapped(**arguments)
    assert right[2].equal(wrong[3])
    assert right[3].equal(wrong[2])

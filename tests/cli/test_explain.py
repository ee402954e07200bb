"""``hwfuse explain``."""

from __future__ import annotations

import json


def test_explain_for_absent_hardware_answers(run):
    """A machine without the device says what would run there, with a reason for each other id."""
    words = "fp8_blockscale_gemm --device rocm:gfx950 --m 64 --n 7168 --k 2048 --json"
    result = run("explain", *words.split())
    decision = json.loads(result.out)
    assert result.code == 0
    assert decision["facts"]["target"] == "rocm:gfx950"
    assert (decision["facts"]["m"], decision["facts"]["n"], decision["facts"]["k"]) == (
        64,
        7168,
        2048,
    )
    assert decision["pretended"] is True
    assert decision["rejected"]["cuda/triton"] == ["serves nvidia; this call is on rocm:gfx950"]


def test_explain_here_names_the_choice(run):
    """Without options it is this machine and the spec's own sizes."""
    result = run("explain", "fused_qkvzba")
    assert result.code == 0
    assert "chosen    " in result.out


def test_explain_dtype_is_read_as_a_dtype(run):
    """An option takes the type of its keyword; underscores work as in Python."""
    result = run("explain", "fused_qkvzba", "--dtype", "float16", "--num_v_heads=48")
    assert "qkvz.dtype=float16" in result.out
    assert "num_v_heads=48" in result.out


def test_explain_unknown_op_lists_ops(run):
    """An unknown op is usage, and says what there is."""
    result = run("explain", "fused_qkvz", "--m", "4")
    assert result.code == 2
    assert "no op is called 'fused_qkvz' (did you mean 'fused_qkvzba'?); ops: " in result.err


def test_explain_wrong_type_says_what_is_needed(run):
    """A value that is no number is refused before anything is asked."""
    result = run("explain", "fused_qkvzba", "--m", "many")
    assert result.code == 2
    assert "argument --m: found 'many', needed a value of type int" in result.err


def test_explain_wrong_dtype_says_what_is_needed(run):
    """A dtype that torch does not have is refused."""
    result = run("explain", "fused_qkvzba", "--dtype", "bf16")
    assert "argument --dtype: found 'bf16', needed a dtype such as bfloat16" in result.err


def test_explain_help_lists_the_ops_own_sizes(run):
    """With an op's name the help shows its keywords with their defaults."""
    result = run("explain", "fused_qkvzba", "--help")
    assert "--num-k-heads … " in result.out
    assert "int, default 16" in result.out


def test_explain_wrong_device_says_the_form(run):
    """A device that cannot be parsed is usage."""
    result = run("explain", "fused_qkvzba", "--device", "h100")
    assert result.code == 2
    assert "needed 'cpu', 'cuda:sm90' or 'rocm:gfx950' style" in result.err


def test_explain_pin_that_cannot_run_fails(run, settings):
    """If nothing can run the call, the answer is printed and the exit code is 1."""
    settings(HWFUSE_USE="fused_qkvzba=cuda/cublas")
    result = run("explain", "fused_qkvzba", "--device", "cuda:sm90")
    assert result.code == 1
    assert "rejected  cuda/cublas" in result.out

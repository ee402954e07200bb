"""Run small models with and without hwfuse, and show what hwfuse did and why.

A Qwen3-Next in detail, then Qwen3.5, Gemma 4, Kimi Linear, and a DeepSeek-V3 in FP8.

The weights are random and nothing is downloaded.  Every claim on the screen is checked; the exit
code is 1 if one does not hold.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
import textwrap
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import hwfuse
from hwfuse import _policy_file, _state
from hwfuse._cli._output import say
from hwfuse._cli._threads import one_thread
from hwfuse._errors import IntegrationError
from hwfuse.ops import fused_qkvzba as spec

OP = "fused_qkvzba"
_EXAMPLE = "acme"  # the plugin in examples/
_PROMPT = (5, 17, 101, 42, 8, 64, 99, 23)
_NEW_TOKENS = 16
_WIDTH = 100  # of the screen
_ROUNDING = 1e-5  # of logits near 2: one GEMM for several may add up in another order
# Name, builder and its options, and how often each op runs for one token.
_MORE: tuple[tuple[str, str, dict[str, int], dict[str, int]], ...] = (
    ("Qwen3.5", "tiny_qwen3_5", {}, {}),
    ("Qwen3.5, rows of 100", "tiny_qwen3_5", {"num_v_heads": 2}, {"fused_qkvzba": 2}),
    ("Gemma 4", "tiny_gemma4", {}, {"qkv_rms_norm": 1, "q_keqv_rms_norm": 1, "q_rms_norm": 2}),
    ("Kimi Linear", "tiny_kimi_linear", {}, {"fused_qkvbfg": 2}),
)


def arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:  # noqa: ARG001
    """Declare the options."""
    parser.add_argument("--device", default="cpu", metavar="D", help="torch device; default cpu")


def run(options: argparse.Namespace) -> int:
    """Show everything in order; 1 if a check failed."""
    if importlib.util.find_spec("transformers") is None:
        raise IntegrationError(
            "the demo needs transformers, which is not installed here: "
            "pip install 'hwfuse[transformers]'"
        )
    start = time.perf_counter()
    show = _Show()
    with warnings.catch_warnings(), _no_settings(), one_thread():
        warnings.simplefilter("ignore")  # torch and transformers speak of other things
        _silence_transformers()
        model = _Model(_tiny("tiny_qwen3_next"), options.device)
        say(f"A tiny Qwen3-Next with random weights, on {options.device}; nothing is downloaded.")
        _with_and_without(show, model)
        _what_ran(show, model)
        _flip_by_yaml(show, model)
        _wrong_implementation(show)
        _other_hardware(show, model)
        _interpreted(show, model)
        _more_families(show, options.device)
        _fp8_checkpoint(show, options.device)
    seconds = time.perf_counter() - start
    say()
    if show.failed:
        say(f"{len(show.failed)} of {show.checked} checks failed: {'; '.join(show.failed)}")
        return 1
    say(f"All {show.checked} checks hold ({seconds:.0f} s).")
    say("Next: hwfuse doctor, hwfuse ops, hwfuse explain, hwfuse parity.")
    return 0


class _Show:
    """The screen: numbered sections, texts, and claims that are checked."""

    def __init__(self) -> None:
        self.sections = self.checked = 0
        self.failed: list[str] = []

    def section(self, title: str) -> None:
        self.sections += 1
        say(f"\n{self.sections}. {title}")

    def text(self, text: object) -> None:
        for line in str(text).splitlines():
            indent = " " * (3 + len(line) - len(line.lstrip()))
            wrapped = textwrap.wrap(
                line.lstrip(), _WIDTH, initial_indent=indent, subsequent_indent=indent + "  "
            )
            say("\n".join(wrapped))

    def check(self, claim: str, holds: bool) -> None:  # noqa: FBT001 - a claim and its truth
        self.checked += 1
        if not holds:
            self.failed.append(claim)
        say(f"   {'ok    ' if holds else 'FAILED'} {claim}")


class _Model:
    """A model, and what it computed before anything was changed."""

    def __init__(self, module: Any, device: str) -> None:
        self.module = module.to(device)
        self.prompt = torch.tensor([_PROMPT], device=device)
        self.stock_logits, self.stock_tokens = self.logits(), self.tokens()

    def logits(self) -> Tensor:
        with torch.no_grad():
            logits: Tensor = self.module(self.prompt).logits
        return logits

    def tokens(self) -> list[int]:
        """Generate greedily; one forward pass per new token."""
        with torch.no_grad():
            output = self.module.generate(
                self.prompt,
                attention_mask=torch.ones_like(self.prompt),
                do_sample=False,
                min_new_tokens=_NEW_TOKENS,
                max_new_tokens=_NEW_TOKENS,
            )
        tokens: list[int] = output[0, self.prompt.shape[1] :].tolist()
        return tokens

    def sizes(self) -> dict[str, Any]:
        """Return the prompt's call of the op, as keywords of its `make_inputs`."""
        config = self.module.config
        return {
            "m": self.prompt.numel(),
            "num_k_heads": config.linear_num_key_heads,
            "num_v_heads": config.linear_num_value_heads,
            "head_k_dim": config.linear_key_head_dim,
            "head_v_dim": config.linear_value_head_dim,
            "dtype": self.stock_logits.dtype,
        }


def _tiny(name: str, **options: int) -> Any:
    """Build one of the tiny models."""
    from hwfuse.integrations import _tiny

    return getattr(_tiny, name)(**options)


def _with_and_without(show: _Show, model: _Model) -> None:
    from hwfuse.integrations.transformers import patch, unpatch

    show.section("The same model with and without hwfuse: patch(model)")
    show.text(patch(model.module))
    difference = (model.logits() - model.stock_logits).abs().max().item()
    show.check(f"largest difference of the logits: {difference}", difference == 0)
    same = model.tokens() == model.stock_tokens
    show.check(f"generates the same tokens: {' '.join(map(str, model.stock_tokens))}", same)
    unpatch(model.module)
    with hwfuse.record() as record:
        again = model.logits()
    undone = not record.calls and torch.equal(again, model.stock_logits)
    show.check("unpatch(model) takes it out again", undone)
    patch(model.module)


def _what_ran(show: _Show, model: _Model) -> None:
    show.section("What ran, and why: hwfuse.record()")
    with hwfuse.record() as record:
        model.tokens()
    for (op, chosen), count in record.calls.items():
        show.text(f"{op} ran {count} times, by {chosen}")
    show.text(record.decisions[0])
    expected = _calls(model)
    claim = f"{expected} calls: one per linear attention layer and new token"
    show.check(claim, record.calls.total() == expected)


def _flip_by_yaml(show: _Show, model: _Model) -> None:
    from hwfuse.integrations.transformers import patch

    show.section("One line of YAML puts another implementation in: hwfuse.configure(path)")
    before = hwfuse.explain(OP, device=str(model.prompt.device), **model.sizes()).chosen
    found = [i for i in _state.registry().implementations(OP) if i.startswith(_EXAMPLE + "/")]
    if not found:
        show.text("left out: the example plugin is not installed")
        show.text("pip install --no-build-isolation --no-deps ./examples/hwfuse-acme")
        return
    text = f"version: 1\nops:\n  {OP}: {found[0]}\n"
    show.text(text)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "flip.yaml")
        path.write_text(text, encoding="utf-8")
        hwfuse.configure(path)
        try:
            report = patch(model.module)  # patched already: it only reports anew
            with hwfuse.record() as record:
                same = model.tokens() == model.stock_tokens
        finally:
            hwfuse.configure(None)
    show.text(report)
    ran = dict(record.calls)
    flipped = before != found[0] and ran == {(OP, found[0]): _calls(model)}
    show.check(f"{found[0]} ran instead of {before}", flipped)
    show.check("generates the same tokens", same)


def _wrong_implementation(show: _Show) -> None:
    from hwfuse import testing

    show.section("A wrong implementation is caught: hwfuse.testing.run()")
    show.text("one with b and a exchanged: shapes and dtypes are right, a model would babble")
    with testing.implementation(OP, "demo/swapped", _swapped):
        report = testing.run([OP], ["demo"], "cpu")
    failures = [text for line in report.lines.values() for text in line.failed.values()]
    show.text(failures[0] if failures else "nothing failed")
    claim = f"parity refuses it: {len(failures)} checks fail"
    show.check(claim, bool(failures) and "output b: every bit must arrive" in failures[0])


def _swapped(
    qkvz: Tensor, ba: Tensor, *, head_k_dim: int, head_v_dim: int, layout: str = "interleaved"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    m, num_k_heads, num_v_heads, _ = spec.sizes(
        qkvz, ba, head_k_dim=head_k_dim, head_v_dim=head_v_dim, layout=layout
    )
    records = num_k_heads if layout == "interleaved" else 1
    qk, vz = num_k_heads * head_k_dim // records, num_v_heads * head_v_dim // records
    q, k, v, z = qkvz.unflatten(1, (records, 2 * qk + 2 * vz)).split([qk, qk, vz, vz], dim=2)
    a, b = ba.unflatten(1, (records, 2 * num_v_heads // records)).chunk(2, dim=2)  # the mistake
    return (
        torch.cat([q.flatten(1), k.flatten(1), v.flatten(1)], dim=1),
        z.reshape(m, num_v_heads, head_v_dim).clone(),
        b.reshape(m, num_v_heads).clone(),
        a.reshape(m, num_v_heads).clone(),
    )


def _other_hardware(show: _Show, model: _Model) -> None:
    show.section("The same call on hardware that is not here: hwfuse.explain(…, device=…)")
    for device in ("cuda:sm90", "rocm:gfx950"):
        decision = hwfuse.explain(OP, device=device, **model.sizes())
        show.text(decision)
        told = {decision.chosen, *decision.passed_over, *decision.rejected}
        everything = set(_state.registry().implementations(OP))
        show.check(f"{device}: every implementation is chosen or has a reason", everything <= told)


def _interpreted(show: _Show, model: _Model) -> None:
    from hwfuse import testing

    target = "cuda:sm90"
    show.section(f"A GPU kernel on this CPU: hwfuse.testing.pretend({target!r})")
    if model.prompt.device.type != "cpu" or importlib.util.find_spec("triton") is None:
        show.text("left out: it needs CPU tensors, and Triton for its interpreter")
        return
    with testing.pretend(target), hwfuse.record() as record:
        same = model.tokens() == model.stock_tokens
    ((_, chosen), count), *others = record.calls.items()
    claim = f"{chosen} ran {count} times, in Triton's interpreter"
    show.check(claim, not others and chosen == "cuda/triton" and count == _calls(model))
    show.check("generates the same tokens", same)


def _more_families(show: _Show, device: str) -> None:
    from hwfuse.integrations.transformers import patch

    show.section("More families under patch(model): the same tokens, and what ran")
    for name, builder, options, per_token in _MORE:
        model = _Model(_tiny(builder, **options), device)
        report = patch(model.module)
        difference = (model.logits() - model.stock_logits).abs().max().item()
        with hwfuse.record() as record:
            same = model.tokens() == model.stock_tokens
        expected = {op: count * _NEW_TOKENS for op, count in per_token.items()}
        say(f"   {name}")
        for entry in report.patched:
            show.text(f"  {_times(entry.modules)} {entry.name}: {entry.mode}")
        ran = _by_op(record)
        counts = ", ".join(f"{op} {_times(count)}" for op, count in ran.items()) or "no op"
        show.check(f"{name}: {counts}, in {_NEW_TOKENS} passes", ran == expected)
        claim = f"{name}: the same tokens; logits differ by {difference:.1e}"
        show.check(f"{claim}, at most {_ROUNDING:.0e}", same and difference <= _ROUNDING)


def _fp8_checkpoint(show: _Show, device: str) -> None:
    from transformers import AutoModelForCausalLM

    from hwfuse.integrations import quantized
    from hwfuse.integrations._tiny_deepseek import tiny_deepseek_v3, write_fp8_checkpoint
    from hwfuse.nn import FP8BlockLinear

    show.section(f"A DeepSeek-V3 checkpoint in FP8, on {device}: quantized.registered()")
    full = _Model(tiny_deepseek_v3(), device)
    with tempfile.TemporaryDirectory() as folder, quantized.registered():
        write_fp8_checkpoint(full.module, Path(folder))
        module, keys = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        model = _Model(module, device)
    linears = [m for m in module.modules() if isinstance(m, FP8BlockLinear)]
    codes = sum(p.numel() for p in module.parameters() if p.dtype == torch.float8_e4m3fn)
    share = codes / sum(p.numel() for p in full.module.parameters())
    show.check(f"{len(linears)} FP8BlockLinears; no key is missing or left over",
               bool(linears) and not any(keys.values()))  # fmt: skip
    show.check(f"{share:.0%} of the weights are fp8 in memory", share > 0.5)
    with hwfuse.record() as record:
        same = model.tokens() == model.stock_tokens
    ran = _by_op(record)
    show.text(", ".join(f"{op} {_times(count)}" for op, count in ran.items()))
    claim = f"fp8_blockscale_gemm {_times(ran['fp8_blockscale_gemm'])}, in {_NEW_TOKENS} passes"
    show.check(claim, ran["fp8_blockscale_gemm"] >= len(linears) * _NEW_TOKENS)
    show.check(f"generates, twice the same: {' '.join(map(str, model.stock_tokens))}", same)
    right = _error(model.stock_logits, full.stock_logits)
    with torch.no_grad():
        for linear in linears:
            linear.weight_scale_inv.copy_(linear.weight_scale_inv.flip(0, 1))
    wrong = _error(model.logits(), full.stock_logits)
    show.text(f"logits beside those in bfloat16: {right:.0%} off; random weights magnify rounding")
    claim = f"scales in another order give {wrong:.0%}: the right ones were used"
    show.check(claim, 3 * right < wrong)


def _error(found: Tensor, expected: Tensor) -> float:
    """Return the relative error of a token's logits, median over tokens."""
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    return float(error.median())


def _by_op(record: hwfuse.Record) -> Counter[str]:
    counts: Counter[str] = Counter()
    for (op, _), count in record.calls.items():
        counts[op] += count
    return counts


def _times(count: int) -> str:
    return f"{count}x"


def _calls(model: _Model) -> int:
    """Return how often the op must run to generate: once per linear attention layer and token."""
    layers: list[str] = model.module.config.layer_types
    return layers.count("linear_attention") * _NEW_TOKENS


@contextmanager
def _no_settings() -> Iterator[None]:
    """Leave the user's HWFUSE_* variables aside: the screen speaks of the built-in order."""
    with mock.patch.dict(os.environ):
        for name in _policy_file.VARIABLES:
            os.environ.pop(name, None)
        _state.forget()
        yield
    _state.forget()


def _silence_transformers() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

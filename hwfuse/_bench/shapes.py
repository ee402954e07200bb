"""What is measured: for each op named shapes of real models, each at several M.

M is the number of tokens, which is what `--m` selects.  The other keywords are those of the op's
`make_inputs`; the ops of a mixture of experts have a maker of their own in `inputs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from hwfuse import _spec
from hwfuse._errors import InputError, suggestion


class Shape(NamedTuple):
    """One shape of an op: its name, keywords besides m, and the M it is measured at."""

    name: str
    keywords: dict[str, Any]
    ms: tuple[int, ...]


class Task(NamedTuple):
    """One op at one shape and M."""

    op: str
    shape: str
    m: int


ALL = (1, 64, 512, 4096, 16384)
_DECODE = (1, 8, 32, 64, 128, 4096)
_PREP = (1, 64, 512, 4096)
_SMALL = (1, 8, 512, 4096)
_GROUPED = (1, 8, 64, 512, 4096)

_COLUMNS = {"scale_layout": "column_tma"}
_DEEPSEEK = (Shape("deepseek-v3", {"k": 7168, **_COLUMNS}, ALL),)
_GEMMA = (Shape("gemma4-31b", {"num_q_heads": 32, "num_kv_heads": 16, "head_dim": 256}, ALL),)
_SHARED_KV = (Shape("gemma4-e4b", {"num_q_heads": 8, "head_dim": 256}, ALL),)
# Tensor parallel over 8: a slice of each of the 256 experts; expert parallel: 32 whole ones.
_TP8 = {"num_experts": 256, "total_experts": 256, "topk": 8, "n": 256, "k": 7168}
_EP8 = {"num_experts": 32, "total_experts": 256, "topk": 8, "n": 2048, "k": 7168}


def _deepseek_moe(ms: tuple[int, ...]) -> tuple[Shape, ...]:
    return Shape("deepseek-v3-tp8", _TP8, ms), Shape("deepseek-v3-ep8", _EP8, ms)


def _gated_delta(num_v_heads: int, layout: str) -> dict[str, Any]:
    return {"num_k_heads": 16, "num_v_heads": num_v_heads, "layout": layout}


def _plain_quant(k: int, layout: str) -> Shape:
    return Shape(f"k{k}-{layout}", {"k": k, "scale_layout": layout}, ALL)


SHAPES: dict[str, tuple[Shape, ...]] = {
    "fused_qkvzba": (
        Shape("qwen3-next", _gated_delta(32, "interleaved"), ALL),
        Shape("qwen3.5-397b", _gated_delta(64, "contiguous"), ALL),
        Shape("qwen3.5-27b", _gated_delta(48, "contiguous"), ALL),
    ),
    "qkv_rms_norm": _GEMMA,
    "qkv_rms_norm_": _GEMMA,
    "q_keqv_rms_norm": (
        Shape("gemma4-31b", {"num_q_heads": 32, "num_kv_heads": 4, "head_dim": 512}, ALL),
    ),
    "q_rms_norm": _SHARED_KV,
    "q_rms_norm_": _SHARED_KV,
    "rms_norm_fp8_group_quant": _DEEPSEEK,
    "add_rms_norm_fp8_group_quant": _DEEPSEEK,
    "rms_norm_and_fp8_group_quant": _DEEPSEEK,
    "add_rms_norm_and_fp8_group_quant": _DEEPSEEK,
    "fp8_group_quant": (
        _plain_quant(7168, "row"),
        _plain_quant(7168, "column"),
        _plain_quant(7168, "column_tma"),
        _plain_quant(2048, "row"),
        _plain_quant(2048, "column_tma"),
    ),
    "flatten_fp8_group_quant": (
        Shape(
            "deepseek-v3-tp8",
            {"num_heads": 16, "head_dim": 128, "is_heads_first": True, **_COLUMNS},
            ALL,
        ),
    ),
    "silu_mul_fp8_group_quant": (Shape("deepseek-v3", {"k": 2048, **_COLUMNS}, ALL),),
    "fused_qkvbfg": (
        Shape("kimi-linear-tp4", {"num_heads": 8}, _DECODE),
        Shape("kimi-linear", {"num_heads": 32}, _DECODE),
    ),
    "fp8_blockscale_gemm": (
        Shape("deepseek-v3", {"n": 7168, "k": 2048, **_COLUMNS}, (1, 64, 512, 4096)),
    ),
    "w4a8_moe_prep": _deepseek_moe(_PREP),
    "moe_input_scale": _deepseek_moe(_SMALL),
    "moe_permute_fp8_quant": _deepseek_moe(_SMALL),
    "silu_mul_fp8_quant": _deepseek_moe(_SMALL),
    "moe_unpermute_reduce": _deepseek_moe(_SMALL),
    "w4a8_grouped_gemm": (
        Shape("deepseek-v3-tp8-gemm1", {**_TP8, "n": 512}, _GROUPED),
        Shape("deepseek-v3-tp8-gemm2", {**_TP8, "n": 7168, "k": 256}, _GROUPED),
        Shape("deepseek-v3-ep8-gemm1", {**_EP8, "n": 4096}, _GROUPED),
        Shape("deepseek-v3-ep8-gemm2", {**_EP8, "n": 7168, "k": 2048}, _GROUPED),
        Shape("deepseek-v3-tp8-gemm1-hot", {**_TP8, "n": 512, "hot": 0.5}, (64, 512, 4096)),
        Shape(
            "odd-sizes",
            {"num_experts": 48, "total_experts": 48, "topk": 6, "n": 1344, "k": 1152},
            _GROUPED,
        ),
    ),
    "w4a8_moe": (
        *_deepseek_moe(_GROUPED),
        Shape("deepseek-v3-tp8-hot", {**_TP8, "hot": 0.5}, (512, 4096)),
    ),
}  # fmt: skip


def shape(op: str, name: str) -> Shape:
    """Return an op's shape of this name."""
    return next(each for each in SHAPES[op] if each.name == name)


def select(
    ops: Sequence[str] = (), names: Sequence[str] = (), ms: Sequence[int] = ()
) -> list[Task]:
    """Return what to measure, in the order of the ops' names; each argument is a choice or all.

    An M that no shape lists may be asked for: it is measured at each shape.
    """
    chosen = list(ops) or list(_spec.names())
    known = sorted({each.name for op in chosen for each in SHAPES[op]})
    for name in names:
        if name not in known:
            hint = suggestion(name, known)
            raise InputError("--shape", f"{name!r}{hint}", f"one of {', '.join(known)}")
    for m in ms:
        if m < 1:
            raise InputError("--m", m, "a positive number")
    return [
        Task(op, each.name, m)
        for op in chosen
        for each in SHAPES[op]
        if not names or each.name in names
        for m in (ms or each.ms)
    ]

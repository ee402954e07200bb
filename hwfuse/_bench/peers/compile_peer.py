"""`torch.compile` of what PyTorch users write: the reference, or PyTorch's own operators."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from hwfuse import _spec, _state
from hwfuse._bench.peers import Prepare, Registry
from hwfuse._bench.peers.torch_peer import kda
from hwfuse._implementation import REFERENCE

registry = Registry("compile")

# The references without loops over experts and without waiting for the GPU.
_REFERENCES = (
    "fused_qkvzba",
    "qkv_rms_norm",
    "q_keqv_rms_norm",
    "q_rms_norm",
    "fp8_group_quant",
    "rms_norm_fp8_group_quant",
    "add_rms_norm_fp8_group_quant",
    "rms_norm_and_fp8_group_quant",
    "add_rms_norm_and_fp8_group_quant",
    "flatten_fp8_group_quant",
    "silu_mul_fp8_group_quant",
    "moe_permute_fp8_quant",
    "moe_unpermute_reduce",
)
# What it fuses it does not round in between, which moves single codes.
_NEAR = {
    "q": ("fp8_codes", {"max_codes": 1, "share": 2e-2}),
    "scale": ("rel_frobenius", {"bound": 1e-3}),
}


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.config.recompile_limit = 1 << 16  # noqa: SLF001 - each shape is compiled for itself
    return torch.compile(function, dynamic=False, fullgraph=True)


def _of_reference(op: str) -> Prepare:
    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        function = _compiled(_state.registry().implementations(op)[REFERENCE].load())
        args, kwargs = _spec.load(op).split(arguments)
        return lambda: function(*args, **kwargs)

    return prepare


for _op in _REFERENCES:
    _quantises = _op not in ("fused_qkvzba", "qkv_rms_norm", "q_keqv_rms_norm", "q_rms_norm")
    registry.add(_op, tolerance=_NEAR if _quantises else None)(_of_reference(_op))


@registry.add("fused_qkvbfg", name="linear + bmm")
def linear_and_bmm(arguments: Mapping[str, Any]) -> Callable[[], Any]:
    """Compile the two products."""
    x, weight, w_fg = (arguments[name] for name in ("x", "w_qkvbfg", "w_fg"))
    function = _compiled(kda)
    return lambda: function(x, weight, w_fg)

"""DeepGEMM's product of fp8 blocks; https://github.com/deepseek-ai/DeepGEMM."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hwfuse import layouts
from hwfuse._bench.peers import Registry, load

registry = Registry("deepgemm")


@registry.add("fp8_blockscale_gemm", name="fp8_gemm_nt")
def fp8_gemm(arguments: Mapping[str, Any]) -> Callable[[], Any]:
    """Use the kernel with scales in the layout that it asks for."""
    deep_gemm = load("deep_gemm")
    a, b, b_scale = (arguments[name] for name in ("a", "b", "b_scale"))
    a_scale = layouts.convert(arguments["a_scale"], "column_tma")

    def call() -> Any:
        out = a.new_empty((a.shape[0], b.shape[0]), dtype=arguments["out_dtype"])
        deep_gemm.fp8_gemm_nt((a, a_scale), (b, b_scale), out)
        return out

    return call

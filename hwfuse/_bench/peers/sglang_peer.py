"""SGLang's Triton kernels, its CUDA kernels compiled at first use, and those of sglang-kernel.

https://github.com/sgl-project/sglang; the module names are those of release 0.5.23.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hwfuse._bench.inputs import copied
from hwfuse._bench.peers import ROUNDED_TWICE, Comparator, Missing, Registry, _marlin, load

registry = Registry("sglang")

Arguments = Mapping[str, Any]
Call = Callable[[], Any]

_FP8 = torch.float8_e4m3fn
_OPS = "sglang.kernels.ops"
# Compiled with --use_fast_math: the division of the scale is off by an ulp or two, and a few per
# mille of the codes are the neighbouring ones.
_FAST_MATH: Mapping[str, Comparator] = {
    "q": ("fp8_codes", {"max_codes": 1, "share": 1e-2}),
    "scale": ("rel_frobenius", {"bound": 1e-3}),
    "rows": ("fp8_codes", {"max_codes": 1, "share": 1e-2, "valid_rows": "route_to_row"}),
}
# SiLU is rounded to bfloat16 before the product.
_EARLY_ROUNDING: Mapping[str, Comparator] = {
    "q": ("fp8_codes", {"max_codes": 2, "share": 0.3, "valid_rows": "expert_offsets"}),
}


@registry.add("fused_qkvzba", name="triton")
def split(arguments: Arguments) -> Call:
    """Use the kernel of the layout."""
    module = load(f"{_OPS}.attention.triton_gdn_fused_proj")
    qkvz, ba, dk, dv = (arguments[n] for n in ("qkvz", "ba", "head_k_dim", "head_v_dim"))
    name = "fused_qkvzba_split_reshape_cat"
    if arguments["layout"] == "contiguous":
        name += "_contiguous"
    function = getattr(module, name)
    num_v_heads = ba.shape[1] // 2
    num_k_heads = (qkvz.shape[1] - 2 * num_v_heads * dv) // (2 * dk)
    return lambda: function(qkvz, ba, num_k_heads, num_v_heads, dk, dv)


@registry.add("qkv_rms_norm", "qkv_rms_norm_", name="triton", note="in place")
def three_norms(arguments: Arguments) -> Call:
    """Normalise copies in place."""
    names = ("q", "k", "v")
    own = copied({name: arguments[name] for name in names})
    return _norms(arguments, *(own[name] for name in names))


@registry.add("q_keqv_rms_norm", name="triton", note="in place; its GEMM writes k twice")
def two_norms(arguments: Arguments) -> Call:
    """Use the kernel of three norms on a copy of k."""
    own = copied({"q": arguments["q"], "kv": arguments["kv"]})
    return _norms(arguments, own["q"], own["kv"], own["kv"].clone())


@registry.add("q_rms_norm", "q_rms_norm_", name="triton", note="in place")
def one_norm(arguments: Arguments) -> Call:
    """Normalise a copy in place."""
    return _norms(arguments, copied({"q": arguments["q"]})["q"], None, None)


def _norms(arguments: Arguments, q: Tensor, k: Tensor | None, v: Tensor | None) -> Call:
    function = load(f"{_OPS}.layernorm.gemma4_fused_ops").gemma_qkv_rmsnorm
    dim, eps = arguments["head_dim"], arguments["eps"]
    weights = arguments["q_weight"], arguments.get("k_weight")
    heads = q.shape[1] // dim, 0 if k is None else k.shape[1] // dim

    def call() -> Any:
        function(q, k, v, *weights, *heads, dim, eps)
        return q if k is None else (q, k, v)

    return call


@registry.add("fp8_group_quant", name="jit", tolerance=_FAST_MATH)
def jit_quant(arguments: Arguments) -> Call:
    """Use the CUDA kernel that is compiled at first use."""
    quant, column = _jit_quant(), _is_column(arguments)
    x = arguments["x"]
    return lambda: quant(x, column_major_scales=column)


@registry.add("fp8_group_quant", name="sglang-kernel v2", tolerance=_FAST_MATH)
def aot_quant(arguments: Arguments) -> Call:
    """Use the CUDA kernel of the wheel."""
    load("sgl_kernel")
    function = torch.ops.sgl_kernel.sgl_per_token_group_quant_8bit_v2.default
    x, column = arguments["x"], _is_column(arguments)
    m, groups = x.shape[0], x.shape[1] // 128
    padded = -(-m // 4) * 4

    def call() -> tuple[Tensor, Tensor]:
        q = torch.empty_like(x, dtype=_FP8)
        if column:
            scale = x.new_empty((groups, padded), dtype=torch.float32).t()[:m]
        else:
            scale = x.new_empty((m, groups), dtype=torch.float32)
        function(x, q, scale, 128, 1e-10, -448.0, 448.0, False, False, None)  # noqa: FBT003 - positions only
        return q, scale

    return call


@registry.add(
    "silu_mul_fp8_group_quant", name="jit, rounds before quantising", tolerance=ROUNDED_TWICE
)
def jit_silu_quant(arguments: Arguments) -> Call:
    """Use the mode that rounds the product, not the SiLU, to bfloat16."""
    quant, column = _jit_quant(), _is_column(arguments)
    x = arguments["x"]
    return lambda: quant(
        x, column_major_scales=column, fuse_silu_and_mul=True, silu_and_mul_mode="dense"
    )


@registry.add(
    "rms_norm_fp8_group_quant", "rms_norm_and_fp8_group_quant",
    name="sglang-kernel rmsnorm + jit quant", tolerance=ROUNDED_TWICE,
)  # fmt: skip
def norm_then_quant(arguments: Arguments) -> Call:
    """Use two kernels."""
    load("sgl_kernel")
    norm = torch.ops.sgl_kernel.rmsnorm.default
    quant, column = _jit_quant(), _is_column(arguments)
    x, weight, eps = (arguments[name] for name in ("x", "weight", "eps"))

    def call() -> tuple[Tensor, ...]:
        y = torch.empty_like(x)
        norm(y, x, weight, eps, True)  # noqa: FBT003 - positions only: programmatic launch
        return *quant(y, column_major_scales=column), y

    return call


@registry.add(
    "add_rms_norm_fp8_group_quant", "add_rms_norm_and_fp8_group_quant",
    name="sglang-kernel fused_add_rmsnorm + jit quant", tolerance=ROUNDED_TWICE,
)  # fmt: skip
def add_norm_then_quant(arguments: Arguments) -> Call:
    """Use two kernels, the first in place."""
    load("sgl_kernel")
    norm = torch.ops.sgl_kernel.fused_add_rmsnorm.default
    quant, column = _jit_quant(), _is_column(arguments)
    weight, eps = arguments["weight"], arguments["eps"]
    x, residual = arguments["x"].clone(), arguments["residual"].clone()

    def call() -> tuple[Tensor, ...]:
        norm(x, residual, weight, eps, True)  # noqa: FBT003 - positions only: programmatic launch
        return *quant(x, column_major_scales=column), residual, x

    return call


def _jit_quant() -> Callable[..., Any]:
    function: Callable[..., Any] = load(
        f"{_OPS}.quantization.per_token_group_quant"
    ).per_token_group_quant
    return function


def _is_column(arguments: Arguments) -> bool:
    if arguments["scale_layout"] == "column" and arguments["x"].shape[0] % 4:
        raise Missing("its columns of scales are padded to a multiple of 4")
    return bool(arguments["scale_layout"] != "row")


@registry.add("w4a8_moe_prep", name="jit cutlass_prepare_moe_input")
def prep(arguments: Arguments) -> Call:
    """Use the three kernels that replaced get_cutlass_w4a8_moe_mm_data."""
    function = load(f"{_OPS}.moe.cutlass_prepare_moe_input").cutlass_prepare_moe_input
    ids, experts, n, k = (arguments[name] for name in ("topk_ids", "num_experts", "n", "k"))

    def call() -> tuple[Tensor, ...]:
        offsets, sizes1, sizes2 = (
            ids.new_empty(s) for s in (experts + 1, (experts, 3), (experts, 3))
        )
        row_to_token, route_to_row = ids.new_empty(ids.numel()), torch.empty_like(ids)
        function(
            ids, offsets, sizes1, sizes2, row_to_token, route_to_row.view(-1), experts, n, k,
            transpose_problem_sizes=True,
        )  # fmt: skip
        return offsets, sizes1, sizes2, route_to_row, row_to_token

    return call


def _triton_moe() -> Any:
    return load(f"{_OPS}.moe.ep_moe_kernels")


@registry.add("moe_input_scale", name="triton")
def input_scale(arguments: Arguments) -> Call:
    """Fill the smallest scale in, then let the kernel raise it."""
    function = _triton_moe().compute_cutlass_w4a8_moe_input_scale
    x, ids, experts = (arguments[name] for name in ("x", "topk_ids", "num_experts"))

    def call() -> Any:
        scale = torch.full((1,), 1e-10 / 448, device=x.device)
        function(input=x, topk_ids=ids, output_s=scale, num_local_experts=experts)
        return scale

    return call


@registry.add("moe_permute_fp8_quant", name="triton", tolerance=_FAST_MATH)
def permute(arguments: Arguments) -> Call:
    """Use the kernel before its first grouped GEMM."""
    function = _triton_moe().pre_reorder_for_cutlass_moe
    x, rows, scale = (arguments[name] for name in ("x", "route_to_row", "scale"))
    (m, k), topk = x.shape, rows.shape[1]
    ids = torch.where(rows >= 0, 0, -1).int()

    def call() -> Any:
        out = x.new_empty((m * topk, k), dtype=_FP8)
        function(x, out, rows, ids, scale, 1, topk, m, k)
        return out

    return call


@registry.add("silu_mul_fp8_quant", name="triton", tolerance=_EARLY_ROUNDING)
def activation(arguments: Arguments) -> Call:
    """Use the kernel between its grouped GEMMs."""
    function = _triton_moe().silu_mul_static_tensorwise_quant_for_cutlass_moe
    rows, scale, offsets = (arguments[name] for name in ("rows", "scale", "expert_offsets"))
    m, n = rows.shape[0], rows.shape[1] // 2

    def call() -> Any:
        out = rows.new_empty((m, n), dtype=_FP8)
        function(rows, out, scale, offsets[-1:], m, n)
        return out

    return call


@registry.add(
    "moe_unpermute_reduce", name="triton",
    tolerance={"out": ("rel_frobenius", {"bound": 1e-2})},  # it sums in bfloat16
)  # fmt: skip
def reduce(arguments: Arguments) -> Call:
    """Use the kernel after its second grouped GEMM."""
    function = _triton_moe().post_reorder_for_cutlass_moe
    names = ("rows", "route_to_row", "topk_weights", "routed_scaling_factor")
    rows, route_to_row, weights, factor = (arguments[name] for name in names)
    (m, topk), k = route_to_row.shape, rows.shape[1]
    ids = torch.where(route_to_row >= 0, 0, -1).int()

    def call() -> Any:
        out = rows.new_empty((m, k))
        function(rows, out, route_to_row, ids, weights, 1, topk, m, k, factor)
        return out

    return call


@registry.add("w4a8_grouped_gemm", name="sglang-kernel cutlass_w4a8_moe_mm")
def cutlass(arguments: Arguments) -> Call:
    """Use CUTLASS's kernel with the problem sizes made before."""
    function = load("sgl_kernel").cutlass_w4a8_moe_mm
    names = ("a", "a_scale", "b", "b_scale", "expert_offsets")
    a, a_scale, b, b_scale, offsets = (arguments[name] for name in names)
    num_experts, n, k = b.shape[0], b.shape[1], a.shape[1]
    if n % 128 or k % 256:
        raise Missing("it needs n a multiple of 128 and k one of 256")
    counts = offsets.diff()
    sizes = torch.stack(
        [torch.full_like(counts, n), counts, torch.full_like(counts, k)], dim=1
    ).contiguous()
    by_k, by_n = (_strides(num_experts, width, a.device) for width in (k, n))
    starts = offsets[:-1]

    def call() -> Any:
        out = a.new_empty((a.shape[0], n), dtype=torch.bfloat16)
        function(out, a, b, a_scale, b_scale, starts, sizes, by_k, by_k, by_n, by_n, 128, 8)
        return out

    return call


registry.add(
    "w4a8_grouped_gemm", name="jit marlin", note="bfloat16 activations",
    tolerance={"rows": ("rel_frobenius", {"bound": 1e-2, "valid_rows": "expert_offsets"})},
)(_marlin.grouped_gemm)  # fmt: skip


def _strides(num_experts: int, width: int, device: torch.device) -> Tensor:
    return torch.full((num_experts, 3), width, device=device, dtype=torch.int64)


@registry.add(
    "w4a8_moe", name="cutlass_w4a8_moe",
    # It rounds SiLU and the sum over the routes to bfloat16.
    tolerance={"out": ("rel_frobenius", {"bound": 5e-2})},
)  # fmt: skip
def moe(arguments: Arguments) -> Call:
    """Use its whole layer: the parts above, one after the other."""
    function = load("sglang.srt.layers.moe.cutlass_w4a8_moe").cutlass_w4a8_moe
    names = ("x", "w13", "w2", "w13_scale", "w2_scale", "topk_weights", "topk_ids")
    x, w13, w2, w13_scale, w2_scale, weights, ids = (arguments[name] for name in names)
    num_experts, n, k = w13.shape[0], w13.shape[1] // 2, x.shape[1]
    by_k, by_2n, by_n = (_strides(num_experts, width, x.device) for width in (k, 2 * n, n))
    offsets = ids.new_empty(num_experts + 1)
    sizes1, sizes2 = (ids.new_empty((num_experts, 3)) for _ in range(2))
    return lambda: function(
        x, w13, w2, w13_scale, w2_scale, weights, ids, by_k, by_k, by_2n, by_n, by_n, by_k, by_2n,
        by_k, offsets, sizes1, sizes2, arguments["a1_scale"], arguments["a2_scale"],
        routed_scaling_factor=arguments["routed_scaling_factor"],
    )  # fmt: skip

"""Reference of w4a8_moe: the references of its parts, one after the other."""

from __future__ import annotations

from torch import Tensor

from hwfuse.ops import w4a8_moe as spec
from hwfuse_reference.torch_ops.moe_input_scale import moe_input_scale, tensor_scale
from hwfuse_reference.torch_ops.moe_permute_fp8_quant import moe_permute_fp8_quant
from hwfuse_reference.torch_ops.moe_unpermute_reduce import moe_unpermute_reduce
from hwfuse_reference.torch_ops.silu_mul_fp8_group_quant import silu_mul
from hwfuse_reference.torch_ops.silu_mul_fp8_quant import silu_mul_fp8_quant
from hwfuse_reference.torch_ops.w4a8_grouped_gemm import w4a8_grouped_gemm
from hwfuse_reference.torch_ops.w4a8_moe_prep import w4a8_moe_prep

REQUIRES = {"deterministic": True}


def w4a8_moe(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w13: Tensor,
    w13_scale: Tensor,
    w2: Tensor,
    w2_scale: Tensor,
    a1_scale: Tensor,
    a2_scale: Tensor,
    *,
    routed_scaling_factor: float = 1.0,
) -> Tensor:
    _, n, k, _, num_experts = spec.sizes(
        x,
        topk_ids,
        topk_weights,
        w13,
        w13_scale,
        w2,
        w2_scale,
        a1_scale,
        a2_scale,
        routed_scaling_factor=routed_scaling_factor,
    )
    offsets, _, _, route_to_row, _ = w4a8_moe_prep(topk_ids, num_experts=num_experts, n=n, k=k)
    if not a1_scale.numel():
        a1_scale = moe_input_scale(x, topk_ids, num_experts=num_experts)
    a1 = moe_permute_fp8_quant(x, route_to_row, a1_scale)
    gate_up = w4a8_grouped_gemm(a1, a1_scale, w13, w13_scale, offsets)
    if not a2_scale.numel():
        a2_scale = tensor_scale(silu_mul(gate_up[: int(offsets[-1])]))
    a2 = silu_mul_fp8_quant(gate_up, a2_scale, offsets)
    rows = w4a8_grouped_gemm(a2, a2_scale, w2, w2_scale, offsets)
    return moe_unpermute_reduce(
        rows, route_to_row, topk_weights, routed_scaling_factor=routed_scaling_factor
    )

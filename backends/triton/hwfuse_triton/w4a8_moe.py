"""w4a8_moe as a chain of ops: each part runs on the implementation that is best for it.

The parts are ops, not implementations: prep and GEMMs may be CUDA C++ while the rest is Triton, a
policy for a part holds here too, and `hwfuse.record` and `hwfuse.decisions` show what each ran on.
Six launches where prep is one; each scale that is not given costs two more.
"""

import torch

import hwfuse
from hwfuse.ops import w4a8_moe as spec
from hwfuse_triton._launch import empty
from hwfuse_triton.moe_rows import silu_mul_scale

_prep = hwfuse.op("w4a8_moe_prep")
_input_scale = hwfuse.op("moe_input_scale")
_permute = hwfuse.op("moe_permute_fp8_quant")
_gemm = hwfuse.op("w4a8_grouped_gemm")
_silu = hwfuse.op("silu_mul_fp8_quant")
_reduce = hwfuse.op("moe_unpermute_reduce")


def w4a8_moe(
    x,
    topk_ids,
    topk_weights,
    w13,
    w13_scale,
    w2,
    w2_scale,
    a1_scale,
    a2_scale,
    *,
    routed_scaling_factor=1.0,
    wave=32,
):
    m, n, k, _, num_experts = spec.sizes(
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
    if m == 0:
        return empty(x, (0, k), torch.bfloat16)
    offsets, _, _, route_to_row, _ = _prep(topk_ids, num_experts=num_experts, n=n, k=k)
    if not a1_scale.shape[0]:
        a1_scale = _input_scale(x, topk_ids, num_experts=num_experts)
    rows = _permute(x, route_to_row, a1_scale)
    rows = _gemm(rows, a1_scale, w13, w13_scale, offsets)
    if not a2_scale.shape[0]:
        a2_scale = silu_mul_scale(rows, offsets, wave=wave)
    rows = _silu(rows, a2_scale, offsets)
    rows = _gemm(rows, a2_scale, w2, w2_scale, offsets)
    return _reduce(rows, route_to_row, topk_weights, routed_scaling_factor=routed_scaling_factor)

"""One line per op: the inputs that every implementation of it is tried on."""

import torch

from hwfuse.testing import row

M = (0, 1, 37)
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
WEIGHTS = (None, torch.float32)  # None: that of the activations
FP8 = (None, torch.float8_e4m3fnuz)  # None: that of the device
GDN_HEADS = (
    {"num_k_heads": 2, "num_v_heads": 6, "head_k_dim": 16, "head_v_dim": 24},
    {"num_k_heads": 3, "num_v_heads": 3, "head_k_dim": 64, "head_v_dim": 32},
)
Q_HEADS = ({"num_q_heads": 4, "head_dim": 64}, {"num_q_heads": 3, "head_dim": 256})
GEMMA_HEADS = (
    {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 64},
    {"num_q_heads": 3, "num_kv_heads": 1, "head_dim": 256},
)
GROUPS = ({"k": 640, "group_size": 128}, {"k": 192, "group_size": 64})
SCALES = tuple(
    {"scale_layout": layout, "scale_format": scale_format}
    for layout in ("row", "column", "column_tma")
    for scale_format in ("fp32", "ue8m0", "ue8m0_packed")
    if scale_format != "ue8m0_packed" or layout == "column_tma"
)
HEADS = (
    {"num_heads": 3, "head_dim": 256, "is_heads_first": False},
    {"num_heads": 2, "head_dim": 128, "is_heads_first": True},
)
W4A8 = (
    {"num_experts": 1, "n": 192, "k": 512, "interleave": 4},
    {"num_experts": 9, "n": 256, "k": 512, "interleave": 1},
    {"num_experts": 5, "n": 37, "k": 384, "interleave": 1},
)
W4A8_LAYER = ({"num_experts": 3, "n": 128, "k": 512}, {"num_experts": 9, "n": 512, "k": 640})
GEMM = (
    {"n": 576, "k": 640, "is_preshuffled": False},
    {"n": 37, "k": 128, "is_preshuffled": False},
    {"n": 576, "k": 640, "is_preshuffled": True},
)

MATRIX = {
    "add_rms_norm_and_fp8_group_quant": row(
        m=M, groups=GROUPS, scale=SCALES, fp8=FP8, dtype=FLOATS[:2]
    ),
    "add_rms_norm_fp8_group_quant": row(m=M, groups=GROUPS, scale=SCALES, fp8=FP8, dtype=FLOATS),
    "flatten_fp8_group_quant": row(m=M, heads=HEADS, scale=SCALES, fp8=FP8, dtype=FLOATS),
    "fp8_blockscale_gemm": row(m=M, b=GEMM, scale=SCALES, fp8=FP8, dtype=FLOATS[:2]),
    "fp8_group_quant": row(m=M, groups=GROUPS, scale=SCALES, fp8=FP8, dtype=FLOATS),
    "fused_qkvbfg": row(m=M, hidden_size=96, num_heads=(1, 3), head_dim=64, dtype=FLOATS),
    "fused_qkvzba": row(m=M, h=GDN_HEADS, layout=("interleaved", "contiguous"), dtype=FLOATS),
    "moe_input_scale": row(m=M, topk=(1, 8), num_experts=(1, 33), k=640, dtype=FLOATS),
    "moe_permute_fp8_quant": row(m=M, topk=(1, 8), k=640, dtype=FLOATS),
    "moe_unpermute_reduce": row(m=M, topk=(1, 8), num_rows=37 * 8, k=640, dtype=FLOATS),
    "q_keqv_rms_norm": row(m=M, h=GEMMA_HEADS, weight_dtype=WEIGHTS, dtype=FLOATS),
    "q_rms_norm": row(m=M, h=Q_HEADS, weight_dtype=WEIGHTS, dtype=FLOATS),
    "q_rms_norm_": row(m=M, h=Q_HEADS, weight_dtype=WEIGHTS, dtype=FLOATS),
    "qkv_rms_norm": row(m=M, h=GEMMA_HEADS, weight_dtype=WEIGHTS, dtype=FLOATS),
    "qkv_rms_norm_": row(m=M, h=GEMMA_HEADS, weight_dtype=WEIGHTS, dtype=FLOATS),
    "rms_norm_and_fp8_group_quant": row(
        m=M, groups=GROUPS, scale=SCALES, fp8=FP8, dtype=FLOATS[:2]
    ),
    "rms_norm_fp8_group_quant": row(m=M, groups=GROUPS, scale=SCALES, fp8=FP8, dtype=FLOATS),
    "silu_mul_fp8_group_quant": row(m=M, groups=GROUPS, scale=SCALES, fp8=FP8, dtype=FLOATS),
    "silu_mul_fp8_quant": row(m=M, num_experts=(1, 33), n=256, dtype=FLOATS),
    "w4a8_grouped_gemm": row(m=M, b=W4A8),
    "w4a8_moe": row(m=M, topk=(1, 8), w=W4A8_LAYER, is_dynamic=(False, True)),
    "w4a8_moe_prep": row(m=M, topk=(1, 8), num_experts=(1, 33, 256), n=256, k=512),
}

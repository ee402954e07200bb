"""One line per op: the inputs that every implementation of it is tried on."""

import itertools

import torch

from hwfuse.testing import row

M = (0, 1, 37)
QUANT_M = (0, 1, 9)  # the rows of `make_inputs` that are special are among the first 8
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


def quant(dtypes, sizes=GROUPS):
    """Every scale with both sizes; the fp8 types go with the sizes, the types of x with scales."""
    return tuple(
        {**size, **scale, "fp8": fp8, "dtype": dtype}
        for scale, dtype in zip(SCALES, itertools.cycle(dtypes), strict=False)
        for size, fp8 in zip(sizes, FP8, strict=True)
    )


KDA = tuple({"m": m, "num_heads": heads} for m, heads in ((0, 1), (1, 3), (37, 3), (65, 1)))
HEADS = (
    {"num_heads": 3, "head_dim": 256, "is_heads_first": False},
    {"num_heads": 2, "head_dim": 128, "is_heads_first": True},
)
W4A8 = (
    {"num_experts": 1, "n": 192, "k": 512, "interleave": 4},
    {"num_experts": 9, "n": 256, "k": 512, "interleave": 1},
    {"num_experts": 5, "n": 37, "k": 384, "interleave": 1},
    {"num_experts": 9, "n": 192, "k": 640, "is_repacked": True},
)
W4A8_LAYER = (
    {"num_experts": 2, "n": 128, "k": 512, "is_dynamic": False},
    {"num_experts": 5, "n": 256, "k": 128, "is_dynamic": True},
)
GEMM = (
    {"n": 576, "k": 640, "is_preshuffled": False},
    {"n": 37, "k": 128, "is_preshuffled": False},
    {"n": 576, "k": 640, "is_preshuffled": True},
)
# Rows above which rocm/ck is refused; the weights are too large for a matrix: tests/amd.
SAFE_ROWS = (
    "(b.shape[0], k, m > 512) not in ((4608, 4096, True),)",
    "(b.shape[0], k, m > 2048) not in ((2560, 4096, True), (4096, 2048, True))",
    "(b.shape[0], k, m > 4096) not in ((4096, 1024, True),)",
)

MATRIX = {
    "add_rms_norm_and_fp8_group_quant": row(m=QUANT_M, quant=quant(FLOATS[:2])),
    "add_rms_norm_fp8_group_quant": row(m=QUANT_M, quant=quant(FLOATS)),
    "flatten_fp8_group_quant": row(m=QUANT_M, quant=quant(FLOATS, HEADS)),
    "fp8_blockscale_gemm": row(
        m=M, b=GEMM, scale=SCALES, fp8=FP8, dtype=FLOATS[:2], implied=SAFE_ROWS
    ),
    "fp8_group_quant": row(m=QUANT_M, quant=quant(FLOATS)),
    "fused_qkvbfg": row(size=KDA, hidden_size=96, head_dim=32, dtype=FLOATS),
    "fused_qkvzba": row(m=M, h=GDN_HEADS, layout=("interleaved", "contiguous"), dtype=FLOATS),
    "moe_input_scale": row(m=M, topk=(1, 8), num_experts=(1, 33), k=640, dtype=FLOATS),
    "moe_permute_fp8_quant": row(m=M, topk=(1, 8), k=640, dtype=FLOATS),
    "moe_unpermute_reduce": row(m=M, topk=(1, 8), num_rows=37 * 8, k=640, dtype=FLOATS),
    "q_keqv_rms_norm": row(m=(0, 1, 9), h=GEMMA_HEADS, weight_dtype=WEIGHTS, dtype=FLOATS),
    "q_rms_norm": row(m=(0, 1, 9), h=Q_HEADS, weight_dtype=WEIGHTS, dtype=FLOATS),
    "q_rms_norm_": row(m=(0, 1, 9), h=Q_HEADS, weight_dtype=WEIGHTS, dtype=FLOATS),
    "qkv_rms_norm": row(m=(0, 1, 9), h=GEMMA_HEADS, weight_dtype=WEIGHTS, dtype=FLOATS),
    "qkv_rms_norm_": row(m=(0, 1, 9), h=GEMMA_HEADS, weight_dtype=WEIGHTS, dtype=FLOATS),
    "rms_norm_and_fp8_group_quant": row(m=QUANT_M, quant=quant(FLOATS[:2])),
    "rms_norm_fp8_group_quant": row(m=QUANT_M, quant=quant(FLOATS)),
    "silu_mul_fp8_group_quant": row(m=QUANT_M, quant=quant(FLOATS)),
    "silu_mul_fp8_quant": row(m=M, num_experts=(1, 33), n=256, dtype=FLOATS),
    "w4a8_grouped_gemm": row(m=M, b=W4A8),
    "w4a8_moe": row(m=M, topk=3, w=W4A8_LAYER),
    "w4a8_moe_prep": row(m=M, topk=(1, 8), num_experts=(1, 65), n=256, k=512),
}

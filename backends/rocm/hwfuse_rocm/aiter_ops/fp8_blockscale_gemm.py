"""fp8_blockscale_gemm: aiter's Triton GEMM for a plain weight, its best one for a preshuffled.

Which kernel runs for a preshuffled weight (CK, assembly, Triton) aiter decides, by tuned tables.
Its assembly truncates to bfloat16 where others round, which is within the op's tolerance.

ROCm's compiler before 7.2 miscompiles the preshuffled kernels (SGLang #23671).
"""

import torch
from torch import Tensor

from hwfuse import layouts
from hwfuse.ops import fp8_blockscale_gemm as spec
from hwfuse_rocm import _aiter

REQUIRES = {
    "arch": ("gfx942", "gfx950"),
    "packages": ("rocm>=7.2",),
    "facts": (
        "a_scale.dtype == float32",
        "a.is_contiguous()",
        "b.is_contiguous()",
        "b_scale.is_contiguous()",
        "aligned(a, 16)",
        "aligned(b, 16)",
        "(a.dtype == float8_e4m3fnuz) == (arch == gfx942)",
    ),
}
COPIES = {"a_scale": "row or column_tma -> column, for a preshuffled b"}
VARIANTS = {
    "aiter's Triton GEMM": "b.ndim == 2",
    "gemm_a8w8_blockscale_bpreshuffle, where aiter decides": "b.ndim == 5",
}


def fp8_blockscale_gemm(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    m, n, k = spec.sizes(a, a_scale, b, b_scale, out_dtype=out_dtype)
    if m == 0:
        return spec.outputs(a, a_scale, b, b_scale, out_dtype=out_dtype)
    _aiter.check_size("a", m, max(n, k))
    _aiter.check_size("b", n, k)
    if b.ndim == 2:
        gemm = _aiter.function("triton_gemm_a8w8_blockscale")
        return gemm(a, b, a_scale, b_scale, dtype=out_dtype)
    columns = layouts.to_aiter_legacy(layouts.convert(a_scale, "column"))
    gemm = _aiter.function("gemm_a8w8_blockscale_bpreshuffle")
    return gemm(a, b.view(n, k), columns, b_scale, dtype=out_dtype)

"""fp8_blockscale_gemm: Composable Kernel, for a plain weight; it also serves ROCm before 7.2.

There CK gives NaN above these numbers of rows (SGLang's table); the limits are kept on every ROCm.
"""

import torch
from torch import Tensor

from hwfuse import layouts
from hwfuse.ops import fp8_blockscale_gemm as spec
from hwfuse_rocm import _aiter

REQUIRES = {
    "arch": ("gfx942", "gfx950"),
    "facts": (
        "b.ndim == 2",
        "a_scale.dtype == float32",
        "a.is_contiguous()",
        "b.is_contiguous()",
        "b_scale.is_contiguous()",
        "aligned(a, 16)",
        "aligned(b, 16)",
        "(a.dtype == float8_e4m3fnuz) == (arch == gfx942)",
        "(b.shape[0], k, m > 512) not in ((4608, 4096, True),)",
        "(b.shape[0], k, m > 2048) not in ((2560, 4096, True), (4096, 2048, True))",
        "(b.shape[0], k, m > 4096) not in ((4096, 1024, True),)",
    ),
}
COPIES = {"a_scale": "column or column_tma -> row"}


def fp8_blockscale_gemm(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    m, n, k = spec.sizes(a, a_scale, b, b_scale, out_dtype=out_dtype)
    out = spec.outputs(a, a_scale, b, b_scale, out_dtype=out_dtype)
    if m == 0:
        return out
    _aiter.check_size("a", m, max(n, k))
    _aiter.check_size("b", n, k)
    rows = layouts.convert(a_scale, "row")
    _aiter.function("gemm_a8w8_blockscale_ck")(a, b, rows, b_scale, out)
    return out

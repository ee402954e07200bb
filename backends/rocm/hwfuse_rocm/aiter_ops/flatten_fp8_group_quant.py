"""flatten_fp8_group_quant: aiter's Triton kernel.

Experimental, because aiter drops a NaN (see rms_norm_fp8_group_quant) and applies the floor of the
scale in x's dtype: in bfloat16 a group of zeros gets a scale that is 0.04 % too large.  In float16,
where the floor is 0 and that scale too, the call is refused.
"""

import torch
from torch import Tensor

from hwfuse import layouts
from hwfuse.ops import flatten_fp8_group_quant as spec
from hwfuse_rocm import _aiter

REQUIRES = {
    "arch": ("gfx942", "gfx950"),
    "facts": (
        "x.dtype in (bfloat16, float32)",
        "group_size in (32, 64, 128)",
        # aiter 0.1.7 writes past the row when it is no power of two.
        "head_dim in (32, 64, 128, 256, 512, 1024)",
        "scale_layout in ('row', 'column')",
        "scale_format == 'fp32'",
        "(dtype == float8_e4m3fnuz) == (arch == gfx942)",
    ),
    "experimental": True,
}
COPIES = {"scale": "row -> column, with an aiter that writes only rows (0.1.7)"}


def flatten_fp8_group_quant(
    x: Tensor,
    *,
    group_size: int = 128,
    scale_layout: str = "row",
    scale_format: str = "fp32",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    options = {
        "group_size": group_size,
        "scale_layout": scale_layout,
        "scale_format": scale_format,
        "dtype": dtype,
    }
    m, _, _, k, _ = spec.sizes(x, **options)
    if m == 0:
        return spec.outputs(x, **options)
    _aiter.check_reach("x", x)
    _aiter.check_size("x", m, k)
    label, more = "fused_flatten_fp8_group_quant", {}
    if scale_layout == "column" and _aiter.takes(label, "transpose_scale"):
        more["transpose_scale"] = True  # with honest strides, other than its siblings
    q, scale = _aiter.function(label)(x, group_size, dtype_quant=dtype, **more)
    return q, layouts.convert(scale, scale_layout)

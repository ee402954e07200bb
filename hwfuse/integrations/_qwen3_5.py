"""Qwen3.5 and its MoE: the four input projections of the gated delta net as one GEMM.

The stock model splits nothing, as its projections are apart, and so copies nothing.  Neither do we:
q|k|v, z, b and a are views of the GEMM's rows.  Only in front of a consumer that needs dense rows
`fused_qkvzba` makes them, all four in one kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

import hwfuse
from hwfuse.integrations import _view_packing
from hwfuse.integrations._rewrite import Edit, Rule, Use

PROJECTIONS = """
mixed_qkv = self.in_proj_qkv(hidden_states)
mixed_qkv = mixed_qkv.transpose(1, 2)

z = self.in_proj_z(hidden_states)
z = z.reshape(batch_size, seq_len, -1, self.head_v_dim)

b = self.in_proj_b(hidden_states)
a = self.in_proj_a(hidden_states)
"""

FUSED_PROJECTIONS = """
mixed_qkv, z, b, a = self.hwfuse_project(hidden_states)
mixed_qkv = mixed_qkv.transpose(1, 2)
"""

# A reshape to two dimensions would copy z.
NORM = """
core_attn_out = core_attn_out.reshape(-1, self.head_v_dim)
z = z.reshape(-1, self.head_v_dim)
core_attn_out = self.norm(core_attn_out, z)
"""

FUSED_NORM = """
core_attn_out = self.hwfuse_norm(core_attn_out, z)
"""


def hwfuse_project(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q|k|v, z (by heads), b and a, each with the leading dimensions of the input."""
    projections = packs(self)
    weights = _view_packing.packed_weights(self, projections, hidden_states)
    (linears,) = projections.values()
    if weights is None:
        mixed_qkv, z, b, a = (linear(hidden_states) for linear in linears)
    else:
        rows = F.linear(hidden_states, weights[0])
        if self.hwfuse_pack == "auto" and _dense_consumer(self, rows.shape[-1]):
            return _dense(self, rows)
        widths = [linear.out_features for linear in linears]
        mixed_qkv, z, b, a = rows.split(widths, dim=-1)
    return mixed_qkv, z.view(*z.shape[:-1], -1, self.head_v_dim), b, a


def _dense(module: Any, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Copy the GEMM's rows apart; the op's rows are batch and tokens together."""
    ba_width = 2 * module.num_v_heads
    qkvz, ba = rows.flatten(0, -2).split([rows.shape[-1] - ba_width, ba_width], dim=-1)
    mixed_qkv, z, b, a = hwfuse.op("fused_qkvzba")(
        qkvz,
        ba,
        head_k_dim=module.head_k_dim,
        head_v_dim=module.head_v_dim,
        layout="contiguous",
    )
    lead = rows.shape[:-1]
    return (
        mixed_qkv.unflatten(0, lead),
        z.unflatten(0, lead),
        b.unflatten(0, lead),
        a.unflatten(0, lead),
    )


def hwfuse_norm(self: Any, core_attn_out: Tensor, z: Tensor) -> Tensor:
    """Apply the gated norm to z as it lies; another library's norm gets two dimensions, as ever."""
    shape = (-1, self.head_v_dim) if _other_norm(self) else z.shape
    normed: Tensor = self.norm(core_attn_out.reshape(shape), z.reshape(shape))
    return normed


def packs(module: Any) -> dict[str, Sequence[nn.Linear]]:
    """Return the four projections in the order of the contiguous layout."""
    projections = (module.in_proj_qkv, module.in_proj_z, module.in_proj_b, module.in_proj_a)
    return {"hwfuse_qkvzba": projections}


def _dense_consumer(module: Any, width: int) -> str | None:
    """Name what reads views of rows of this width next and needs dense ones, or None."""
    if width % 8:  # causal_conv1d's condition
        return f"the convolution, which takes rows of 8 * n elements, not of {width}"
    return _other_norm(module)


def _other_norm(module: Any) -> str | None:
    """Name the norm if it is not the model's own code, which takes any strides."""
    norm = module.norm
    if "forward" in norm.__dict__ or type(norm).__module__ != type(module).__module__:
        return f"a replaced {type(norm).__name__}"
    return None


def _use(module: Any, pack: str) -> Use:
    width = sum(linear.out_features for linear in packs(module)["hwfuse_qkvzba"])
    consumer = _dense_consumer(module, width)
    if consumer is None or pack == "view":
        return Use("one GEMM instead of four; views of its rows, no copy")
    sizes = {
        "num_k_heads": module.num_k_heads,
        "num_v_heads": module.num_v_heads,
        "head_k_dim": module.head_k_dim,
        "head_v_dim": module.head_v_dim,
        "layout": "contiguous",
        "dtype": module.conv1d.weight.dtype,
    }
    mode = f"one GEMM instead of four; one copy, for {consumer}"
    return Use(mode, (("fused_qkvzba", sizes),))


RULE = Rule(
    name="qwen3.5",
    version=1,
    classes=("Qwen3_5GatedDeltaNet", "Qwen3_5MoeGatedDeltaNet"),
    ops=("fused_qkvzba",),
    edits=(Edit(PROJECTIONS, FUSED_PROJECTIONS), Edit(NORM, FUSED_NORM)),
    methods=(hwfuse_project, hwfuse_norm, *_view_packing.METHODS),
    use=_use,
    packs=packs,
    needs_packs=True,
)

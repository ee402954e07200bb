"""Every op as plain loops over tokens, heads, groups and experts: slow, and easy to believe.

Each function has its op's name, signature and results, and shares no code with the reference: a
second opinion on it, and what `hwfuse bench` compares its times with.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

import hwfuse
from hwfuse import layouts

_FP8 = torch.float8_e4m3fn
_BLOCK = 128


def fused_qkvzba(
    qkvz: Tensor,
    ba: Tensor,
    *,
    head_k_dim: int,
    head_v_dim: int,
    layout: str = "interleaved",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Copy head by head: each record is [q, k, v, z] or [b, a]; contiguous rows are one record."""
    num_v_heads = ba.shape[1] // 2
    width_v = num_v_heads * head_v_dim
    width_k = (qkvz.shape[1] - 2 * width_v) // 2
    records = width_k // head_k_dim if layout == "interleaved" else 1
    qk, vz, heads = width_k // records, width_v // records, num_v_heads // records
    mixed_qkv = qkvz.new_empty(len(qkvz), 2 * width_k + width_v)
    z = qkvz.new_empty(len(qkvz), width_v)
    b, a = ba.new_empty(len(ba), num_v_heads), ba.new_empty(len(ba), num_v_heads)
    for m, i in itertools.product(range(len(qkvz)), range(records)):
        q_i, k_i, v_i, z_i = qkvz[m, i * 2 * (qk + vz) :][: 2 * (qk + vz)].split([qk, qk, vz, vz])
        mixed_qkv[m, i * qk : (i + 1) * qk] = q_i
        mixed_qkv[m, width_k + i * qk : width_k + (i + 1) * qk] = k_i
        mixed_qkv[m, 2 * width_k + i * vz : 2 * width_k + (i + 1) * vz] = v_i
        z[m, i * vz : (i + 1) * vz] = z_i
        b[m, i * heads : (i + 1) * heads] = ba[m, 2 * i * heads : (2 * i + 1) * heads]
        a[m, i * heads : (i + 1) * heads] = ba[m, (2 * i + 1) * heads : (2 * i + 2) * heads]
    return mixed_qkv, z.view(len(qkvz), num_v_heads, head_v_dim), b, a


def fused_qkvbfg(x: Tensor, w_qkvbfg: Tensor, w_fg: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply token by token, then gate by gate."""
    _, p, head_dim = w_fg.shape
    qkvbfg = x.new_empty(len(x), len(w_qkvbfg))
    gates = x.new_empty(2, len(x), p)
    weights, up = w_qkvbfg.float(), w_fg.float()
    for m in range(len(x)):
        qkvbfg[m] = weights @ x[m].float()
        f_and_g = qkvbfg[m].float()[-2 * head_dim :].split(head_dim)
        for gate, low_rank in enumerate(f_and_g):
            gates[gate, m] = up[gate] @ low_rank
    return qkvbfg, gates


def q_rms_norm(q: Tensor, q_weight: Tensor, *, head_dim: int, eps: float = 1e-6) -> Tensor:
    """Norm head by head."""
    return _norm_heads(q, q_weight, head_dim, eps)


def q_rms_norm_(q: Tensor, q_weight: Tensor, *, head_dim: int, eps: float = 1e-6) -> None:
    """Norm head by head, in place."""
    q.copy_(_norm_heads(q, q_weight, head_dim, eps))


def qkv_rms_norm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    *,
    head_dim: int,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Norm head by head; v has no weight."""
    return (
        _norm_heads(q, q_weight, head_dim, eps),
        _norm_heads(k, k_weight, head_dim, eps),
        _norm_heads(v, None, head_dim, eps),
    )


def qkv_rms_norm_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    *,
    head_dim: int,
    eps: float = 1e-6,
) -> None:
    """Norm head by head, in place."""
    for x, weight in ((q, q_weight), (k, k_weight), (v, None)):
        x.copy_(_norm_heads(x, weight, head_dim, eps))


def q_keqv_rms_norm(
    q: Tensor,
    kv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    *,
    head_dim: int,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Norm head by head; k and v are the same numbers, with and without a weight."""
    return qkv_rms_norm(q, kv, kv, q_weight, k_weight, head_dim=head_dim, eps=eps)


def _norm_heads(x: Tensor, weight: Tensor | None, head_dim: int, eps: float) -> Tensor:
    out = x.new_empty(x.shape)
    for row, row_out in zip(x, out, strict=True):
        heads = zip(row.reshape(-1, head_dim), row_out.view(-1, head_dim), strict=True)
        for head, head_out in heads:
            head_out.copy_(_norm(head.float(), weight, eps))
    return out


def _norm(row: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    y = row * (row.square().mean() + eps).rsqrt()
    return y if weight is None else y * weight.float()


def fp8_group_quant(
    x: Tensor,
    *,
    group_size: int = 128,
    scale_layout: str = "row",
    scale_format: str = "fp32",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantise group by group."""
    rows = [row.float() for row in x]
    return _quantise(x, rows, x.shape[1], group_size, scale_layout, scale_format, dtype)


def flatten_fp8_group_quant(
    x: Tensor,
    *,
    group_size: int = 128,
    scale_layout: str = "row",
    scale_format: str = "fp32",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Lay heads side by side, then quantise group by group."""
    rows = [torch.cat(list(heads)).float() for heads in x]
    width = x.shape[1] * x.shape[2]
    return _quantise(x, rows, width, group_size, scale_layout, scale_format, dtype)


def silu_mul_fp8_group_quant(
    x: Tensor,
    *,
    group_size: int = 128,
    scale_layout: str = "row",
    scale_format: str = "fp32",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Multiply row by row, then quantise group by group."""
    rows = [_silu_mul(row) for row in x]
    return _quantise(x, rows, x.shape[1] // 2, group_size, scale_layout, scale_format, dtype)


def rms_norm_fp8_group_quant(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    group_size: int = 128,
    scale_layout: str = "row",
    scale_format: str = "fp32",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Norm row by row, then quantise group by group."""
    rows = [_norm(row.float(), weight, eps) for row in x]
    return _quantise(x, rows, x.shape[1], group_size, scale_layout, scale_format, dtype)


def rms_norm_and_fp8_group_quant(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    group_size: int = 128,
    scale_layout: str = "row",
    scale_format: str = "fp32",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Norm row by row, then quantise group by group."""
    rows = [_norm(row.float(), weight, eps) for row in x]
    quantised = _quantise(x, rows, x.shape[1], group_size, scale_layout, scale_format, dtype)
    return *quantised, _stacked(rows, x)


def add_rms_norm_fp8_group_quant(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    group_size: int = 128,
    scale_layout: str = "row",
    scale_format: str = "fp32",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Add and norm row by row, then quantise group by group."""
    sums = [one.float() + other.float() for one, other in zip(x, residual, strict=True)]
    rows = [_norm(row, weight, eps) for row in sums]
    quantised = _quantise(x, rows, x.shape[1], group_size, scale_layout, scale_format, dtype)
    return *quantised, _stacked(sums, x)


def add_rms_norm_and_fp8_group_quant(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    group_size: int = 128,
    scale_layout: str = "row",
    scale_format: str = "fp32",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Add and norm row by row, then quantise group by group."""
    sums = [one.float() + other.float() for one, other in zip(x, residual, strict=True)]
    rows = [_norm(row, weight, eps) for row in sums]
    quantised = _quantise(x, rows, x.shape[1], group_size, scale_layout, scale_format, dtype)
    return *quantised, _stacked(sums, x), _stacked(rows, x)


def _stacked(rows: Sequence[Tensor], like: Tensor) -> Tensor:
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    for row, row_out in zip(rows, out, strict=True):
        row_out.copy_(row)
    return out


def _silu_mul(row: Tensor) -> Tensor:
    gate, up = row.float().chunk(2)
    return gate / (1 + (-gate).exp()) * up


def _quantise(
    x: Tensor,
    rows: Sequence[Tensor],
    width: int,
    group_size: int,
    scale_layout: str,
    scale_format: str,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Quantise float32 rows of x's number, *width* elements long."""
    q = x.new_empty(len(x), width, dtype=dtype or hwfuse.fp8_dtype(x.device))
    num_groups = width // group_size
    scale = layouts.empty(
        len(x), num_groups, scale_layout=scale_layout, scale_format=scale_format, device=x.device
    ).zero_()
    qmax = torch.finfo(q.dtype).max
    for m, row in enumerate(rows):
        for g, group in enumerate(row.split(group_size)):
            s = _scale(group, qmax)
            if scale_format != "fp32":
                s = _power_of_two_above(s)
            if scale_format == "ue8m0_packed":
                exponent = (s.view(torch.int32) >> 23) & 0xFF  # a NaN may have a sign
                scale[m, g // 4] |= exponent << 8 * (g % 4)
            else:
                scale[m, g] = s
            q[m, g * group_size : (g + 1) * group_size] = _codes(group, s, qmax)
    return q, scale


def _scale(x: Tensor, qmax: float = 448.0) -> Tensor:
    """Return the scale under which the largest element becomes *qmax*."""
    return x.abs().max().clamp(min=1e-10) / torch.tensor(qmax, device=x.device)


def _codes(x: Tensor, scale: Tensor, qmax: float = 448.0) -> Tensor:
    return (x * (1 / scale)).clamp(-qmax, qmax)


def _power_of_two_above(s: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(s)  # 0.5 is an exact power
    power = torch.ldexp(torch.ones_like(s), exponent - (mantissa == 0.5).int())
    return power if s.isfinite() else s


def fp8_blockscale_gemm(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Multiply token by token and block by block; each finished block gets its two scales."""
    weight = (_without_tiles(b) if b.ndim == 5 else b).float()
    out = torch.zeros(len(a), len(weight), device=a.device)
    for m, g in itertools.product(range(len(a)), range(b_scale.shape[1])):
        columns = slice(g * _BLOCK, (g + 1) * _BLOCK)
        row, row_scale = a[m, columns].float(), _scale_of_group(a_scale[m], g)
        for n in range(len(b_scale)):
            block = slice(n * _BLOCK, (n + 1) * _BLOCK)
            out[m, block] += weight[block, columns] @ row * (row_scale * b_scale[n, g])
    return out.to(out_dtype)


def _scale_of_group(scales: Tensor, g: int) -> Tensor:
    if scales.dtype == torch.float32:
        return scales[g]
    exponent = (scales[g // 4] >> 8 * (g % 4)) & 0xFF
    return (exponent << 23).view(torch.float32)


def _without_tiles(b: Tensor) -> Tensor:
    """Return the plain weight: a tile is 16 rows of 32 columns, in two halves."""
    weight = b.new_empty(16 * b.shape[0], 32 * b.shape[1])
    for i, j, half in itertools.product(*map(range, b.shape[:3])):
        columns = slice(32 * j + 16 * half, 32 * j + 16 * half + 16)
        weight[16 * i : 16 * i + 16, columns] = b[i, j, half]
    return weight


def w4a8_moe_prep(
    topk_ids: Tensor,
    *,
    num_experts: int,
    n: int,
    k: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hand out rows expert by expert, route by route."""
    ids = topk_ids.tolist()
    route_to_row = torch.full_like(topk_ids, -1)
    row_to_token = topk_ids.new_zeros(topk_ids.numel())
    offsets = [0]
    for expert in range(num_experts):
        row = offsets[-1]
        for token, of_token in enumerate(ids):
            for slot, chosen in enumerate(of_token):
                if chosen == expert:
                    route_to_row[token, slot], row_to_token[row] = row, token
                    row += 1
        offsets.append(row)
    counts = [end - start for start, end in itertools.pairwise(offsets)]
    first, second = ([[2 * n, c, k] for c in counts], [[k, c, n] for c in counts])
    expert_offsets, sizes1, sizes2 = (topk_ids.new_tensor(x) for x in (offsets, first, second))
    return expert_offsets, sizes1, sizes2, route_to_row, row_to_token


def moe_input_scale(x: Tensor, topk_ids: Tensor, *, num_experts: int) -> Tensor:
    """Look at token by token; those with routes to other ranks only do not count."""
    largest = torch.zeros((), device=x.device)
    for row, ids in zip(x, topk_ids.tolist(), strict=True):
        if any(0 <= expert < num_experts for expert in ids):
            largest = torch.maximum(largest, row.abs().max().float())  # keeps NaN
    return _scale(largest).view(1)


def moe_permute_fp8_quant(x: Tensor, route_to_row: Tensor, scale: Tensor) -> Tensor:
    """Quantise route by route."""
    rows = x.new_empty(route_to_row.numel(), x.shape[1], dtype=_FP8)
    for token, of_token in enumerate(route_to_row.tolist()):
        for row in of_token:
            if row >= 0:
                rows[row] = _codes(x[token].float(), scale)
    return rows


def w4a8_grouped_gemm(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    expert_offsets: Tensor,
) -> Tensor:
    """Unpack expert by expert, multiply row by row."""
    rows = a.new_empty(len(a), b.shape[1] * (64 if b.ndim == 4 else 1), dtype=torch.bfloat16)
    for e, (start, end) in enumerate(itertools.pairwise(expert_offsets.tolist())):
        if start < end:
            weight = _int4_weight(b, b_scale, e)
            for m in range(start, end):
                rows[m] = a_scale * (weight @ a[m].float())
    return rows


def _int4_weight(packed: Tensor, scale: Tensor, expert: int) -> Tensor:
    """Return float32 ``[N, K]``: low nibbles are the even columns, scales interleaved or not."""
    packed = packed[expert]
    if packed.ndim == 3:
        return _without_blocks(packed)
    scale = scale[expert]
    num_rows, num_groups = len(packed), 2 * packed.shape[1] // _BLOCK
    weight = torch.empty(num_rows, 2 * packed.shape[1], device=packed.device)
    weight[:, 0::2] = (packed << 4) >> 4  # a right shift copies the sign
    weight[:, 1::2] = packed >> 4
    step = scale.shape[1] // num_rows
    for g in range(num_groups):
        of_group = scale[g // step, g % step :: step]
        weight[:, g * _BLOCK : (g + 1) * _BLOCK] *= of_group.float()[:, None]
    return weight


def _without_blocks(blocks: Tensor) -> Tensor:
    """Return float32 ``[N, K]`` of ``[N/64, K/128, 4224]``, row by row of each block."""
    weight = torch.empty(len(blocks), 64, blocks.shape[1], _BLOCK, device=blocks.device)
    scales = blocks[..., 4096:].contiguous().view(torch.bfloat16).float()
    c = torch.arange(_BLOCK, device=blocks.device)  # columns
    place = c // 64 * 2048 + c // 4 % 4 * 16 + c // 32 % 2 * 8 + c // 16 % 2 * 4 + c % 4
    for row in range(64):
        warp, half, g = row // 16, row // 8 % 2, row % 8
        code = blocks[..., place + 512 * warp + 64 * g].int()
        magnitude, sign = (code >> 3 * half) & 7, (code >> (7 - half)) & 1
        number = torch.where(sign == 1, -1 - magnitude, magnitude)
        weight[:, row] = number * scales[..., 16 * warp + 2 * g + half, None]
    return weight.flatten(0, 1).flatten(1)


def silu_mul_fp8_quant(rows: Tensor, scale: Tensor, expert_offsets: Tensor) -> Tensor:
    """Multiply and quantise row by row."""
    q = rows.new_empty(len(rows), rows.shape[1] // 2, dtype=_FP8)
    for m in range(int(expert_offsets[-1])):
        q[m] = _codes(_silu_mul(rows[m]), scale)
    return q


def moe_unpermute_reduce(
    rows: Tensor,
    route_to_row: Tensor,
    topk_weights: Tensor,
    *,
    routed_scaling_factor: float = 1.0,
) -> Tensor:
    """Add up route by route."""
    out = rows.new_empty(len(route_to_row), rows.shape[1])
    for token, of_token in enumerate(route_to_row.tolist()):
        total = torch.zeros(rows.shape[1], device=rows.device)
        for slot, row in enumerate(of_token):
            if row >= 0:
                total += topk_weights[token, slot] * rows[row].float()
        out[token] = routed_scaling_factor * total
    return out


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
    """Run the two layers of an expert over its routes, expert by expert; no permutation."""
    routes = [(topk_ids == expert).nonzero().tolist() for expert in range(len(w13))]
    if not a1_scale.numel():
        a1_scale = moe_input_scale(x, topk_ids, num_experts=len(w13))
    gated: dict[tuple[int, int], Tensor] = {}
    for expert, hits in enumerate(routes):
        if not hits:
            continue
        weight = _int4_weight(w13, w13_scale, expert)
        for token, slot in hits:
            a1 = _codes(x[token].float(), a1_scale).to(_FP8).float()
            gated[token, slot] = _silu_mul((a1_scale * (weight @ a1)).bfloat16())
    if not a2_scale.numel():
        zero = torch.zeros(1, device=x.device)
        a2_scale = _scale(torch.cat([zero, *gated.values()])).view(1)
    out = torch.zeros(x.shape, device=x.device)
    for expert, hits in enumerate(routes):
        if not hits:
            continue
        weight = _int4_weight(w2, w2_scale, expert)
        for token, slot in hits:
            a2 = _codes(gated[token, slot], a2_scale).to(_FP8).float()
            row = (a2_scale * (weight @ a2)).bfloat16().float()
            out[token] += topk_weights[token, slot] * row
    return (routed_scaling_factor * out).to(x.dtype)

"""Arguments to measure with: drawn on the GPU, in as many sets as the caches need.

Plain signed numbers.  What libraries do with NaN, infinities and rows of zeros differs and is no
part of a comparison; `hwfuse parity` covers it for our own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hwfuse import _explain, _spec, _state
from hwfuse._bench.shapes import Task, shape
from hwfuse._errors import InputError
from hwfuse._implementation import REFERENCE
from hwfuse._random import Random
from hwfuse.packing.w4a8 import repack_w4a8

Arguments = dict[str, Any]

_SHARED = 256 << 20  # bytes; a larger weight is not copied: what a call reads of it is new anyway
_FP8 = torch.float8_e4m3fn
# Three deviations fit in the range of fp8, as a checkpoint's static scales have it.
_ACTIVATION_SCALE = 3 / 448


def first_set(task: Task, device: torch.device | str = "cuda") -> Arguments:
    """Make the arguments of one call."""
    keywords = dict(shape(task.op, task.shape).keywords)
    if "total_experts" in keywords:
        return _mixture(task, keywords, seed=0, device=device)
    with _drawn_on(device):
        spec = _spec.load(task.op)
        arguments = _explain.inputs(spec, m=task.m, device=device, **keywords)
    if "group_size" in arguments:
        arguments["x"].normal_()
    return arguments


def next_set(task: Task, first: Arguments, number: int) -> Arguments:
    """Return the same call on other memory; for a mixture of experts with other routes."""
    keywords = dict(shape(task.op, task.shape).keywords)
    if "total_experts" not in keywords:
        return copied(first)
    device = next(value for value in first.values() if isinstance(value, Tensor)).device
    weights = {name: first[name] for name in _WEIGHTS if name in first}
    if sum(map(_num_bytes, weights.values())) < _SHARED:
        weights = copied(weights)
    return _mixture(task, keywords, seed=number, device=device, weights=weights)


def copied(arguments: Mapping[str, Any]) -> Arguments:
    """Copy the tensors: equal values, strides, alignment and sharing of storage."""
    storages: dict[int, Tensor] = {}
    result = dict(arguments)
    for name, tensor in arguments.items():
        if isinstance(tensor, Tensor) and tensor.numel():
            storage = tensor.untyped_storage()
            whole = storages.get(storage.data_ptr())
            if whole is None:
                whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
                whole = storages[storage.data_ptr()] = whole.clone()
            view = whole[: whole.numel() // tensor.element_size() * tensor.element_size()]
            result[name] = view.view(tensor.dtype).as_strided(
                tensor.shape, tensor.stride(), tensor.storage_offset()
            )
    return result


def packed(arguments: Arguments, known: dict[int, tuple[Tensor, Tensor]]) -> Arguments | None:
    """Return the call with int4 weights repacked for Hopper, or None if it has none to repack.

    *known*: by address, what was repacked before; it is added to.
    """
    pairs = [(name, f"{name}_scale") for name in ("b", "w13", "w2") if name in arguments]
    if not pairs or arguments[pairs[0][0]].dtype != torch.int8:
        return None
    result = dict(arguments)
    for name, scale in pairs:
        address = arguments[name].data_ptr()
        if address not in known:
            try:
                known[address] = repack_w4a8(arguments[name], arguments[scale])
            except InputError:
                return None
        result[name], result[scale] = known[address]
    return result


@contextmanager
def _drawn_on(device: torch.device | str) -> Iterator[None]:
    """Let `make_inputs` draw where the tensors lie: on a CPU 200 million numbers take seconds."""
    generator = torch.Generator(device).manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator, device=device)

    def normal(_self: Random, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return draw(shape).to(dtype)

    def integers(_self: Random, low: int, high: int, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, device=device).to(dtype)

    before = Random.normal, Random.integers
    kind: Any = Random
    kind.normal, kind.integers = normal, integers
    try:
        yield
    finally:
        kind.normal, kind.integers = before


_WEIGHTS = ("b", "b_scale", "w13", "w13_scale", "w2", "w2_scale")
_Maker = Callable[..., Arguments]


def _mixture(
    task: Task,
    keywords: Mapping[str, Any],
    *,
    seed: int,
    device: torch.device | str,
    weights: Mapping[str, Tensor] | None = None,
) -> Arguments:
    """Make the arguments of an op of a mixture of experts: the routes of this seed."""
    sizes = {"hot": 0.0, **keywords}
    hot, total = sizes.pop("hot"), sizes.pop("total_experts")
    generator = torch.Generator(device).manual_seed(seed)
    topk, num_experts = sizes["topk"], sizes["num_experts"]
    ids = routes(task.m, topk, num_experts, total=total, hot=hot, generator=generator)
    draw = functools.partial(torch.randn, generator=generator, device=device)
    if task.op == "w4a8_moe":
        return _moe(ids, draw, weights, n=sizes["n"], k=sizes["k"], num_experts=num_experts)
    make: _Maker = globals()[f"_{task.op}"]
    return make(ids, draw, weights, n=sizes["n"], k=sizes["k"], num_experts=num_experts)


def routes(
    m: int, topk: int, num_experts: int, *, total: int, hot: float, generator: torch.Generator
) -> Tensor:
    """Draw for each of m tokens topk different ones of *total* experts; those not here are -1.

    *hot* is the share of tokens that go to expert 0, too.  At least one route is valid.
    """
    while True:
        scores = torch.rand(m, total, generator=generator, device=generator.device)
        scores[: int(hot * m), 0] = 2.0
        ids = scores.topk(topk, dim=1).indices.int()
        ids = ids.masked_fill(ids >= num_experts, -1)
        if (ids >= 0).any():
            return ids


def _plan(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Return expert_offsets and route_to_row of these routes."""
    prep = _state.registry().implementations("w4a8_moe_prep")[REFERENCE].load()
    offsets, _, _, route_to_row, _ = prep(ids, num_experts=num_experts, n=128, k=128)
    return offsets, route_to_row


def _weight(draw: Any, num_experts: int, n: int, k: int) -> tuple[Tensor, Tensor]:
    """Return a packed int4 weight and its scale, interleaved by 4 where it can be."""
    codes = torch.randint(
        -128, 128, (num_experts, n, k // 2), dtype=torch.int8,
        generator=draw.keywords["generator"], device=draw.keywords["device"],
    )  # fmt: skip
    groups = k // 128
    i = 1 if groups % 4 else 4
    scale = (draw(num_experts, groups // i, n * i).abs() + 0.5) * 0.005
    return codes, scale.bfloat16()


def _w4a8_moe_prep(ids: Tensor, *_weights: Any, num_experts: int, n: int, k: int) -> Arguments:
    return {"topk_ids": ids, "num_experts": num_experts, "n": n, "k": k}


def _moe_input_scale(
    ids: Tensor, draw: Any, *_weights: Any, num_experts: int, k: int, **_sizes: int
) -> Arguments:
    return {"x": draw(ids.shape[0], k).bfloat16(), "topk_ids": ids, "num_experts": num_experts}


def _moe_permute_fp8_quant(
    ids: Tensor, draw: Any, *_weights: Any, num_experts: int, k: int, **_sizes: int
) -> Arguments:
    scale = torch.full((1,), _ACTIVATION_SCALE, device=ids.device)
    _offsets, route_to_row = _plan(ids, num_experts)
    return {"x": draw(ids.shape[0], k).bfloat16(), "route_to_row": route_to_row, "scale": scale}


def _silu_mul_fp8_quant(
    ids: Tensor, draw: Any, *_weights: Any, num_experts: int, n: int, **_sizes: int
) -> Arguments:
    scale = torch.full((1,), _ACTIVATION_SCALE, device=ids.device)
    offsets, _route_to_row = _plan(ids, num_experts)
    rows = draw(ids.numel(), 2 * n).bfloat16()
    return {"rows": rows, "scale": scale, "expert_offsets": offsets}


def _moe_unpermute_reduce(
    ids: Tensor, draw: Any, *_weights: Any, num_experts: int, k: int, **_sizes: int
) -> Arguments:
    _offsets, route_to_row = _plan(ids, num_experts)
    return {
        "rows": draw(ids.numel(), k).bfloat16(),
        "route_to_row": route_to_row,
        "topk_weights": draw(*ids.shape).softmax(1),
        "routed_scaling_factor": 2.5,
    }


def _w4a8_grouped_gemm(
    ids: Tensor,
    draw: Any,
    weights: Mapping[str, Tensor] | None,
    *,
    num_experts: int,
    n: int,
    k: int,
) -> Arguments:
    offsets, _route_to_row = _plan(ids, num_experts)
    if weights is None:
        weights = dict(zip(("b", "b_scale"), _weight(draw, num_experts, n, k), strict=True))
    a = draw(ids.numel(), k).div_(_ACTIVATION_SCALE).clamp_(-448, 448).to(_FP8)
    scale = torch.full((1,), _ACTIVATION_SCALE, device=ids.device)
    return {"a": a, "a_scale": scale, **weights, "expert_offsets": offsets}


def _moe(
    ids: Tensor,
    draw: Any,
    weights: Mapping[str, Tensor] | None,
    *,
    num_experts: int,
    n: int,
    k: int,
) -> Arguments:
    if weights is None:
        pairs = (*_weight(draw, num_experts, 2 * n, k), *_weight(draw, num_experts, k, n))
        weights = dict(zip(("w13", "w13_scale", "w2", "w2_scale"), pairs, strict=True))
    return {
        "x": draw(ids.shape[0], k).bfloat16(),
        "topk_ids": ids,
        "topk_weights": draw(*ids.shape).softmax(1),
        **weights,
        "a1_scale": torch.full((1,), _ACTIVATION_SCALE, device=ids.device),
        "a2_scale": torch.full((1,), 1e-3 * k / 448, device=ids.device),
        "routed_scaling_factor": 2.5,
    }


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()

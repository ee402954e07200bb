"""What a call must do, whoever does it: bytes to move, operations to compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hwfuse._spec import Spec

MATRIX_OPS = ("fp8_blockscale_gemm", "fused_qkvbfg", "w4a8_grouped_gemm", "w4a8_moe")
FP8_MATRIX_OPS = ("fp8_blockscale_gemm", "w4a8_grouped_gemm", "w4a8_moe")


def num_bytes(spec: Spec, arguments: Mapping[str, Any], outputs: Sequence[Tensor]) -> int:
    """Return the bytes of a call: each input read once, each output written once.

    What is written in place counts twice.  Of a mixture of experts only the experts that are hit
    and the rows in use count.
    """
    inputs = {name: arguments[name] for name in spec.tensors}
    count = sum(map(_size, inputs.values())) + sum(map(_size, outputs))
    count += sum(_size(inputs[name]) for name in spec.mutates)
    unused = _UNUSED.get(spec.name)
    return count - unused(inputs, outputs) if unused else count


def num_flops(op: str, arguments: Mapping[str, Any]) -> int:
    """Return the floating point operations of an op that is a matrix product, otherwise 0."""
    if op == "fused_qkvbfg":
        per_row = arguments["w_qkvbfg"].numel() + arguments["w_fg"].numel()
        return 2 * len(arguments["x"]) * int(per_row)
    if op == "fp8_blockscale_gemm":
        return 2 * len(arguments["a"]) * int(arguments["b"].numel())
    if op == "w4a8_grouped_gemm":
        used = int(arguments["expert_offsets"][-1])
        return 4 * used * int(arguments["b"][0].numel())  # two numbers to a byte
    if op == "w4a8_moe":
        valid, _ = _routes(arguments["topk_ids"], len(arguments["w13"]))
        return 4 * valid * int(arguments["w13"][0].numel() + arguments["w2"][0].numel())
    return 0


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _row(tensor: Tensor) -> int:
    return tensor[:1].numel() * tensor.element_size()


def _routes(ids: Tensor, num_experts: int) -> tuple[int, int]:
    """Return the number of valid routes and of experts hit."""
    valid = ids[(ids >= 0) & (ids < num_experts)]
    return valid.numel(), valid.unique().numel()


def _unused_gemm(inputs: Mapping[str, Tensor], outputs: Sequence[Tensor]) -> int:
    offsets = inputs["expert_offsets"]
    empty = int((offsets.diff() == 0).sum())
    rows = inputs["a"].shape[0] - int(offsets[-1])
    per_expert = _row(inputs["b"]) + _row(inputs["b_scale"])
    return empty * per_expert + rows * (_row(inputs["a"]) + _row(outputs[0]))


def _unused_moe(inputs: Mapping[str, Tensor], _outputs: Sequence[Tensor]) -> int:
    ids, num_experts = inputs["topk_ids"], inputs["w13"].shape[0]
    _, hit = _routes(ids, num_experts)
    names = ("w13", "w13_scale", "w2", "w2_scale")
    return (num_experts - hit) * sum(_row(inputs[name]) for name in names) + _remote(inputs, ids)


def _remote(inputs: Mapping[str, Tensor], routes: Tensor) -> int:
    """Return the bytes of tokens without a valid route."""
    return int((routes < 0).all(1).sum()) * _row(inputs["x"])


def _unused_permute(inputs: Mapping[str, Tensor], outputs: Sequence[Tensor]) -> int:
    routes = inputs["route_to_row"]
    return _remote(inputs, routes) + int((routes < 0).sum()) * _row(outputs[0])


def _unused_activation(inputs: Mapping[str, Tensor], outputs: Sequence[Tensor]) -> int:
    rows = inputs["rows"].shape[0] - int(inputs["expert_offsets"][-1])
    return rows * (_row(inputs["rows"]) + _row(outputs[0]))


def _unused_reduce(inputs: Mapping[str, Tensor], _: Sequence[Tensor]) -> int:
    used = int((inputs["route_to_row"] >= 0).sum())
    return (inputs["rows"].shape[0] - used) * _row(inputs["rows"])


_UNUSED = {
    "w4a8_grouped_gemm": _unused_gemm,
    "w4a8_moe": _unused_moe,
    "moe_input_scale": lambda inputs, _: _remote(inputs, inputs["topk_ids"]),
    "moe_permute_fp8_quant": _unused_permute,
    "silu_mul_fp8_quant": _unused_activation,
    "moe_unpermute_reduce": _unused_reduce,
}


def as_tensors(result: Any) -> tuple[Tensor, ...]:
    """Return the tensors of a result: none of an op that writes in place."""
    if result is None:
        return ()
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)

"""What the adapters call in AMD's aiter: places, names and parameters, as facts.

Read from aiter e4048607 (22 Aug 2026) and from the wheel amd-aiter 0.1.7.post2.dev18; both fit.
The tests bind every call of an adapter against this table, and compare the table with AMD's sources
where these are installed.  aiter is imported when an adapter first runs, not before.
"""

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from hwfuse import HwfuseError, InputError

_MOST = 2**31 - 1  # AMD's kernels compute addresses in 32 bits


class Function(NamedTuple):
    """A function of aiter.

    Attributes:
        name: As AMD calls it.
        modules: Where it may be, newest first; the first that has it is used.
        parameters: Names and defaults as AMD writes them, at e4048607.
        newer: Those of them that 0.1.7 lacks; always the last ones.
        is_newer: 0.1.7 lacks the function.
        reads: What it takes for granted and does not check.
    """

    name: str
    modules: tuple[str, ...]
    parameters: str
    newer: tuple[str, ...] = ()
    is_newer: bool = False
    reads: str = ""


FUNCTIONS = {
    "per_group_quant_hip": Function(
        "per_group_quant_hip",
        ("aiter.ops.quant",),
        "x, scale=None, quant_dtype=dtypes.i8, group_size=128, transpose_scale=False, "
        "num_rows=None, num_rows_factor=1, scale_type=dtypes.fp32",
        newer=("scale_type",),
        reads="x contiguous, 16 bits; with transpose_scale the bytes of a scale [M, G] are [G, M]",
    ),
    "fused_rms_fp8_group_quant": Function(
        "fused_rms_fp8_group_quant",
        ("aiter.ops.triton.quant.fused_fp8_quant", "aiter.ops.triton.fused_fp8_quant"),
        "inp1, inp1_weight, inp1_epsilon, inp2=None, inp2_weight=None, inp2_epsilon=None, "
        "group_size=128, dtype_quant=fp8_dtype, res1=None, output_unquantized_inp1=False, "
        "transpose_scale=False, is_x_scale_strided=False",
        newer=("is_x_scale_strided",),
        reads="with transpose_scale the bytes of a scale [M, G] are [G, M]",
    ),
    "fused_flatten_fp8_group_quant": Function(
        "fused_flatten_fp8_group_quant",
        ("aiter.ops.triton.quant.fused_fp8_quant", "aiter.ops.triton.fused_fp8_quant"),
        "x, group_size, dtype_quant=fp8_dtype, transpose_scale=False",
        newer=("transpose_scale",),
        reads="0.1.7: a last dimension that is a power of two; transpose_scale has honest strides",
    ),
    "triton_gemm_a8w8_blockscale": Function(
        "gemm_a8w8_blockscale",
        (
            "aiter.ops.triton.gemm.basic.gemm_a8w8_blockscale",
            "aiter.ops.triton.gemm_a8w8_blockscale",
        ),
        "x, w, x_scale, w_scale, dtype=torch.bfloat16, y=None, config=None, skip_reduce=False, "
        "kernel_type='bandwidth_bound', backend=None",
        newer=("kernel_type", "backend"),
        reads="strides, of all arguments",
    ),
    "gemm_a8w8_blockscale_bpreshuffle": Function(
        "gemm_a8w8_blockscale_bpreshuffle",
        ("aiter.ops.gemm_op_a8w8",),
        "XQ, WQ, x_scale, w_scale, dtype=dtypes.bf16, out=None",
        newer=("out",),
        reads="WQ shuffled 16x16; x_scale's bytes as [K/128, M], its shape and strides unread",
    ),
    "gemm_a8w8_blockscale_ck": Function(
        "gemm_a8w8_blockscale_ck",
        ("aiter.ops.gemm_op_a8w8",),
        "XQ, WQ, x_scale, w_scale, Out, splitK=0, kernelName=''",
        newer=("splitK", "kernelName"),
        reads="x_scale's bytes as [M, K/128], its strides unread",
    ),
    "triton_batched_gemm_bf16": Function(
        "batched_gemm_bf16",
        (
            "aiter.ops.triton.gemm.batched.batched_gemm_bf16",
            "aiter.ops.triton.batched_gemm_bf16",
        ),
        "XQ, WQ, bias=None, dtype=torch.bfloat16, splitK=None, YQ=None, config=None, "
        "kernel_type='bandwidth_bound', backend=None",
        newer=("kernel_type", "backend"),
        reads="strides, of all arguments",
    ),
    "batched_gemm_bf16_CK": Function(
        "batched_gemm_bf16_CK",
        ("aiter.ops.batched_gemm_op_bf16",),
        "XQ, WQ, bias=None, dtype=dtypes.bf16, splitK=None",
        reads="XQ and WQ as contiguous, their strides unread",
    ),
    "fused_qkvzba_split_reshape_cat_decode": Function(
        "fused_qkvzba_split_reshape_cat_decode",
        ("aiter.ops.triton._triton_kernels.gated_delta_rule.fused_qkvzba_split",),
        "mixed_qkvz, mixed_ba, num_heads_qk, num_heads_v, head_qk, head_v",
        is_newer=True,
        reads="rows without gaps, widths that are powers of two",
    ),
}


@functools.cache
def function(label: str) -> Callable[..., Any]:
    """Return a function of the table, importing its module; an error says where it was sought."""
    entry = FUNCTIONS[label]
    problems = []
    for module in entry.modules:
        try:
            found: Callable[..., Any] = getattr(importlib.import_module(module), entry.name)
        except (ImportError, AttributeError) as error:
            problems.append(f"{module}: {error}")
        else:
            return found
    text = f"the installed aiter has no {entry.name}, needs amd-aiter 0.1.7 or newer"
    raise HwfuseError("\n  ".join([text, *problems]))


@functools.cache
def takes(label: str, parameter: str) -> bool:
    """Say whether the installed aiter's function has a parameter: by its looks, not its version."""
    return parameter in inspect.signature(function(label)).parameters


def check_reach(name: str, tensor: Tensor) -> None:
    """Raise `InputError` if an element lies further from the first one than 32 bits can say."""
    if tensor.shape[0] * tensor.stride(0) + tensor.shape[1] * tensor.stride(1) > _MOST:
        found = f"shape {tuple(tensor.shape)}, strides {tensor.stride()}"
        raise InputError(name, found, f"at most {_MOST} elements from the first to the last")


def check_size(name: str, num_rows: int, width: int) -> None:
    """Raise `InputError` if an output has more elements than 32 bits can number."""
    if num_rows * width > _MOST:
        raise InputError(name, f"an output of {num_rows} x {width}", f"at most {_MOST} elements")

"""A linear layer that keeps its weight as DeepSeek's FP8 checkpoints store it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import hwfuse
from hwfuse._errors import InputError
from hwfuse.nn._parameters import BLOCK, check_multiple, fp8_block_weight, frozen

_DTYPES = (torch.bfloat16, torch.float16)


class FP8BlockLinear(nn.Module):
    """``x @ W.T + bias`` with W in fp8 and one scale for each 128x128 block of it.

    Calls `fp8_group_quant` and `fp8_blockscale_gemm`; inference only.  The parameters have names,
    shapes and dtypes of the checkpoint, and hold nothing until a state dict is loaded:

    - ``weight``: ``[N, K]`` float8_e4m3fn;
    - ``weight_scale_inv``: ``[ceil(N/128), K/128]`` float32; in spite of its name a factor.  Its
      row i belongs to the weight's rows 128*i to 128*i + 127, as far as these exist;
    - ``bias``: ``[N]``, or None.

    Args:
        in_features: K, a multiple of 128.
        out_features: N, any number.
        bias: whether there is one.
        block_size: what the checkpoint declares; only (128, 128) is implemented.
        scale_format: of the activations' scales: ``"fp32"``, or ``"ue8m0"`` for a checkpoint that
            was made for powers of two.
        out_dtype: bfloat16 or float16; None means that of x, and bfloat16 if x is quantised.
        device: of the parameters.
        dtype: of the bias.

    Raises:
        InputError: in_features or block_size is out of range.
    """

    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        block_size: tuple[int, int] = (BLOCK, BLOCK),
        scale_format: str = "fp32",
        out_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if tuple(block_size) != (BLOCK, BLOCK):
            raise InputError("block_size", block_size, f"({BLOCK}, {BLOCK})")
        check_multiple("in_features", in_features)
        self.in_features, self.out_features = in_features, out_features
        self.scale_format, self.out_dtype = scale_format, out_dtype
        self.weight, self.weight_scale_inv = fp8_block_weight(
            out_features, in_features, device=device
        )
        self.bias = frozen(out_features, dtype=dtype, device=device) if bias else None

    def forward(self, x: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """Return ``[..., N]``.

        Args:
            x: ``[..., K]``, bfloat16 or float16; float32 only if out_dtype is set.  Or the pair
                that `fp8_group_quant` or a norm fused with it returned: codes ``[M, K]`` in the
                weight's dtype, and their scales.

        Raises:
            InputError: an x of another width or dtype.
        """
        codes, scale = x if isinstance(x, tuple) else (x, None)
        shape = codes.shape
        if shape[-1] != self.in_features:
            raise InputError("x.shape[-1]", shape[-1], f"in_features = {self.in_features}")
        out_dtype = self.out_dtype or (codes.dtype if scale is None else torch.bfloat16)
        if scale is None:
            if out_dtype not in _DTYPES:
                raise InputError("x.dtype", out_dtype, "bfloat16 or float16, or an out_dtype set")
            codes, scale = hwfuse.op("fp8_group_quant")(
                codes.reshape(-1, shape[-1]),
                scale_format=self.scale_format,
                dtype=self.weight.dtype,
            )
        out: Tensor = hwfuse.op("fp8_blockscale_gemm")(
            codes, scale, self.weight, self.weight_scale_inv, out_dtype=out_dtype
        )
        if self.bias is not None:
            out = out + self.bias.to(out_dtype)
        return out.view(*shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows in the brackets."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"

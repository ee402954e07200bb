"""The experts of a mixture, with weights as DeepSeek's FP8 checkpoints store them."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

import hwfuse
from hwfuse.nn._parameters import check_multiple, fp8_block_weight


class FP8BlockExperts(nn.Module):
    """Gated experts, ``silu(x @ G.T) * (x @ U.T)`` through ``D``, in fp8 with 128x128 scales.

    Tokens are quantised once, not once per expert.  Inference only.  The parameters are the
    checkpoint's, stacked over the experts, gate above up; they hold nothing until one is loaded:

    - ``gate_up_proj``: ``[E, 2N, K]`` and ``down_proj``: ``[E, K, N]``, float8_e4m3fn;
    - ``gate_up_proj_scale_inv``: ``[E, 2N/128, K/128]`` and ``down_proj_scale_inv``:
      ``[E, K/128, N/128]``, float32, factors in spite of their names.

    Args:
        num_experts: E.
        hidden_size: K, a multiple of 128.
        intermediate_size: N, a multiple of 128.
        scale_format: of the activations' scales, as for `FP8BlockLinear`.
        device: of the parameters.

    Raises:
        InputError: a size is not a multiple of 128.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        scale_format: str = "fp32",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_multiple("hidden_size", hidden_size)
        check_multiple("intermediate_size", intermediate_size)
        self.scale_format = scale_format
        self.gate_up_proj, self.gate_up_proj_scale_inv = fp8_block_weight(
            num_experts, 2 * intermediate_size, hidden_size, device=device
        )
        self.down_proj, self.down_proj_scale_inv = fp8_block_weight(
            num_experts, hidden_size, intermediate_size, device=device
        )

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Return ``[M, K]``: for each token the sum of its experts' results times their weights.

        Args:
            x: ``[M, K]``, bfloat16 or float16.
            topk_ids: ``[M, topk]`` integers; ids of other ranks (below 0, or E and more) are
                left out.
            topk_weights: ``[M, topk]``, any float type.
        """
        num_experts, k, n = self.down_proj.shape
        offsets, _, _, route_to_row, row_to_token = hwfuse.op("w4a8_moe_prep")(
            topk_ids.int(), num_experts=num_experts, n=n, k=k
        )
        bounds = offsets.tolist()
        codes, scale = hwfuse.op("fp8_group_quant")(
            x, scale_format=self.scale_format, dtype=self.down_proj.dtype
        )
        gate_up = x.new_empty(row_to_token.shape[0], 2 * n)
        self._multiply(gate_up, codes[row_to_token], scale[row_to_token], "gate_up_proj", bounds)
        codes, scale = hwfuse.op("silu_mul_fp8_group_quant")(
            gate_up, scale_format=self.scale_format, dtype=self.down_proj.dtype
        )
        rows = x.new_empty(row_to_token.shape[0], k)
        self._multiply(rows, codes, scale, "down_proj", bounds)
        reduce = hwfuse.op("moe_unpermute_reduce")
        out: Tensor = reduce(rows, route_to_row, topk_weights.float())
        return out

    def _multiply(
        self, out: Tensor, codes: Tensor, scale: Tensor, name: str, bounds: list[int]
    ) -> None:
        """Fill the rows of *out* with each expert's product; rows past the last bound stay."""
        weights = zip(getattr(self, name), getattr(self, f"{name}_scale_inv"), strict=True)
        for (start, stop), (weight, weight_scale) in zip(
            itertools.pairwise(bounds), weights, strict=True
        ):
            if start < stop:
                out[start:stop] = hwfuse.op("fp8_blockscale_gemm")(
                    codes[start:stop], scale[start:stop], weight, weight_scale, out_dtype=out.dtype
                )

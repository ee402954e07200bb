"""The experts of a mixture, with int4 weights as W4AFP8 checkpoints store them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import hwfuse
from hwfuse._errors import InputError
from hwfuse.nn._parameters import BLOCK, check_multiple, frozen
from hwfuse.packing import interleave_scales, repack_w4a8, unpack_w4a8


class W4A8Experts(nn.Module):
    """Gated experts with int4 weights and fp8 activations: `w4a8_moe`; inference only.

    The parameters are the checkpoint's, stacked over the experts, gate above up; they hold nothing
    until one is loaded:

    - ``gate_up_proj``: ``[E, 2N, K/2]`` and ``down_proj``: ``[E, K, N/2]``, int8, two numbers to a
      byte as `hwfuse.packing.pack_int4` puts them;
    - ``gate_up_proj_scale_inv``: ``[E, 2N, K/128]`` and ``down_proj_scale_inv``: ``[E, K, N/128]``,
      float32, factors in spite of their names;
    - ``w1_input_scale``, ``w2_input_scale``, ``w3_input_scale`` (of gate, down, up): ``[E]`` or
      ``[E, 1]`` float32, the calibrated scales of the activations.

    What the op reads beside the weights is made from them by `prepare` and kept in buffers that are
    not saved: bfloat16 scales in the GEMM's order, and one activation scale for all experts, the
    largest.  `repack` lays the weights out for Hopper; what is saved and loaded stays the same.

    Args:
        num_experts: E.
        hidden_size: K, a multiple of 128.
        intermediate_size: N, a multiple of 128.
        device: of the parameters.

    Raises:
        InputError: a size is not a multiple of 128.
    """

    w13_scale: Tensor | None
    w2_scale: Tensor | None
    a1_scale: Tensor | None
    a2_scale: Tensor | None

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_multiple("hidden_size", hidden_size)
        check_multiple("intermediate_size", intermediate_size)
        self.gate_up_proj, self.gate_up_proj_scale_inv = _int4_weight(
            num_experts, 2 * intermediate_size, hidden_size, device=device
        )
        self.down_proj, self.down_proj_scale_inv = _int4_weight(
            num_experts, hidden_size, intermediate_size, device=device
        )
        self.w1_input_scale = frozen(num_experts, dtype=torch.float32, device=device)
        self.w2_input_scale = frozen(num_experts, dtype=torch.float32, device=device)
        self.w3_input_scale = frozen(num_experts, dtype=torch.float32, device=device)
        for name in ("w13_scale", "w2_scale", "a1_scale", "a2_scale"):
            self.register_buffer(name, None, persistent=False)
        self.register_load_state_dict_pre_hook(_before_load)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_prepare)  # type: ignore[no-untyped-call]
        self.register_state_dict_post_hook(_after_save)  # type: ignore[no-untyped-call]

    def prepare(self) -> None:
        """Make the op's operands; needed after the parameters changed, done after a load.

        The weights are as in a checkpoint then, also if they were repacked before.
        """
        self._undo_repack()
        self.w13_scale = interleave_scales(self.gate_up_proj_scale_inv)
        self.w2_scale = interleave_scales(self.down_proj_scale_inv)
        self.a1_scale = torch.maximum(self.w1_input_scale, self.w3_input_scale).max().view(1)
        self.a2_scale = self.w2_input_scale.max().view(1)

    def repack(self) -> bool:
        """Lay the weights out as Hopper's kernel reads them, if it is what would run here.

        After `prepare`, on the device of the calls; another load or `prepare` undoes it.  The
        parameters take the place of the checkpoint's, with 3 % more memory.

        Returns:
            Whether they are repacked now.
        """
        if self.w13_scale is None or self.w2_scale is None:
            raise InputError("w13_scale", None, "prepare() after the parameters were filled")
        weights = (self.gate_up_proj, self.down_proj)
        if weights[0].ndim == 4:
            return True
        if weights[0].is_meta:
            return False  # its memory stays on disk until it is used
        decision = hwfuse.explain(
            "w4a8_grouped_gemm",
            device=str(weights[0].device),
            m=1,
            n=weights[0].shape[1],
            k=weights[1].shape[1],
            num_experts=len(weights[0]),
            is_repacked=True,
        )
        if decision.chosen != "cuda/cpp":
            return False
        self.gate_up_proj.data, self.w13_scale = repack_w4a8(weights[0].data, self.w13_scale)
        self.down_proj.data, self.w2_scale = repack_w4a8(weights[1].data, self.w2_scale)
        return True

    def _undo_repack(self) -> None:
        for weight in (self.gate_up_proj, self.down_proj):
            if weight.ndim == 4:
                weight.data, _ = unpack_w4a8(weight.data)

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Return ``[M, K]``: for each token the sum of its experts' results times their weights.

        Args:
            x: ``[M, K]``, as `w4a8_moe` takes it.
            topk_ids: ``[M, topk]`` integers; ids of other ranks (below 0, or E and more) are left
                out.
            topk_weights: ``[M, topk]``, any float type.
        """
        if self.w13_scale is None:
            raise InputError("w13_scale", None, "prepare() after the parameters were filled")
        out: Tensor = hwfuse.op("w4a8_moe")(
            x,
            topk_ids.int(),
            topk_weights.float(),
            self.gate_up_proj,
            self.w13_scale,
            self.down_proj,
            self.w2_scale,
            self.a1_scale,
            self.a2_scale,
        )
        return out


def _before_load(module: W4A8Experts, *_state: object) -> None:
    module._undo_repack()  # noqa: SLF001 - its own hook


def _after_save(
    module: W4A8Experts, state: dict[str, Any], prefix: str, _local_metadata: object
) -> None:
    for name in ("gate_up_proj", "down_proj"):
        if getattr(module, name).ndim == 4:
            state[prefix + name], _ = unpack_w4a8(getattr(module, name).data)


def _prepare(module: W4A8Experts, _incompatible_keys: object) -> None:
    module.prepare()


def _int4_weight(
    num_experts: int, n: int, k: int, *, device: torch.device | str | None
) -> tuple[nn.Parameter, nn.Parameter]:
    weight = frozen(num_experts, n, k // 2, dtype=torch.int8, device=device)
    return weight, frozen(num_experts, n, k // BLOCK, dtype=torch.float32, device=device)

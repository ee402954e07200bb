"""What transformers asks while it loads a quantised checkpoint; quantized.py registers it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.core_model_loading import MergeModulelist, WeightConverter
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from hwfuse._errors import InputError, IntegrationError
from hwfuse.nn import FP8BlockExperts, FP8BlockLinear, W4A8Experts

# What transformers notes on a class of experts, and the only values that ours compute with.
_EXPERTS = {
    "has_gate": True,
    "has_bias": False,
    "has_post_expert_norm": False,
    "is_concatenated": True,
    "is_transposed": False,
}


class FP8Quantizer(HfQuantizer):  # type: ignore[misc]  # untyped
    """Puts hwfuse's layers in the place of a model's linears and experts before they are loaded.

    The layers' parameters are the checkpoint's.  transformers' own conversions stack the experts,
    and their scales likewise: 5.23 because of `serialized_names`, 5.17 because its patterns also
    match names that go on.
    """

    serialized_names = {"weight": ["weight", "weight_scale_inv"]}  # noqa: RUF012 - as in the base
    # Settings of a checkpoint that change what it means, and the values that the layers follow; the
    # first is meant where one is absent.
    settings: dict[str, tuple[Any, ...]] = {  # noqa: RUF012
        "weight_block_size": ((128, 128), [128, 128]),
        "activation_scheme": ("dynamic",),
        "scale_fmt": ("float", "ue8m0"),
        "expert_dtype": ("fp8",),
        "modules_to_convert": (None, []),
        "dequantize": (False,),
    }
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)

    def __init__(self, quantization_config: Any, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self.expected: dict[str, torch.Tensor] = {}  # our layers' parameters, as they were made

    def validate_environment(self, *_args: Any, **_kwargs: Any) -> None:
        """Refuse settings that the layers do not follow; every device will do."""
        if not self.pre_quantized:
            raise IntegrationError(
                "quantization_config: given for a checkpoint that is not quantised; hwfuse only "
                "loads quantised ones (quantized.unregister() gives transformers' own way back)"
            )
        for name, allowed in self.settings.items():
            found = getattr(self.quantization_config, name, allowed[0])
            if found not in allowed:
                needed = " or ".join(map(repr, allowed))
                raise IntegrationError(
                    f"quantization_config.{name}: found {found!r}, needed {needed}"
                )

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Refuse a model dtype that the ops do not return."""
        if dtype not in self.dtypes:
            raise InputError("dtype", dtype, " or ".join(map(str, self.dtypes)))
        return dtype

    def _process_model_before_weight_loading(self, model: Any, **_kwargs: Any) -> None:
        kept = model._keep_in_fp32_modules  # noqa: SLF001 - as every quantizer does
        given = self.quantization_config.modules_to_not_convert
        skipped = self.get_modules_to_not_convert(model, given, kept)
        for name, module in list(model.named_modules()):
            if not should_convert_module(name, skipped):
                continue
            try:
                layer = self.layer_for(name, module)
            except (InputError, IntegrationError) as error:
                raise IntegrationError(f"{name} ({type(module).__name__}): {error}") from error
            if layer is not None:
                model.set_submodule(name, layer)
                self.expected |= dict(layer.named_parameters(prefix=name))

    def layer_for(self, name: str, module: nn.Module) -> nn.Module | None:
        """Return what takes a module's place, without memory; None leaves it."""
        if type(module) is nn.Linear:
            return FP8BlockLinear(
                module.in_features,
                module.out_features,
                bias=module.bias is not None,
                scale_format=self.scale_format,
                device="meta",
                dtype=module.weight.dtype,
            )
        if isinstance(module, nn.Linear):
            raise IntegrationError("hwfuse has no layer for this kind of linear")
        if name.rpartition(".")[2] == "experts":
            return self.experts(*_sizes_of_experts(module))
        return None

    def experts(self, num_experts: int, hidden_size: int, intermediate_size: int) -> nn.Module:
        """Return the layer for experts of these sizes."""
        return FP8BlockExperts(
            num_experts,
            hidden_size,
            intermediate_size,
            scale_format=self.scale_format,
            device="meta",
        )

    @property
    def scale_format(self) -> str:
        """What the layers call the checkpoint's scale_fmt."""
        found = getattr(self.quantization_config, "scale_fmt", "float")
        return "ue8m0" if found == "ue8m0" else "fp32"

    def _process_model_after_weight_loading(self, model: Any, **_kwargs: Any) -> None:
        for name, expected in self.expected.items():
            parameter = model.get_parameter(name)
            if parameter.is_meta:
                continue  # stays on disk until it is used
            if name.endswith(("_scale", "_scale_inv")) and parameter.is_floating_point():
                parameter.data = parameter.data.float()  # bfloat16 and e8m0 occur; both are exact
            self.check(name, parameter, expected)
            parameter.requires_grad_(requires_grad=False)
        for module in model.modules():
            if isinstance(module, W4A8Experts):
                module.prepare()
                module.repack()

    def check(self, name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
        """Raise for what transformers only warns of: a parameter that the checkpoint lacks."""
        if not getattr(found, "_is_hf_initialized", False):
            raise IntegrationError(f"{name}: missing in the checkpoint")
        if found.dtype != expected.dtype:
            raise IntegrationError(f"{name}: found {found.dtype}, needed {expected.dtype}")
        shapes = [list(expected.shape)]
        if name.endswith("_input_scale"):
            shapes.append([*expected.shape, 1])  # each expert's number stood in a list
        if list(found.shape) not in shapes:
            needed = " or ".join(map(str, shapes))
            raise IntegrationError(f"{name}: found {list(found.shape)}, needed {needed}")

    def param_needs_quantization(self, _model: Any, param_name: str, **_kwargs: Any) -> bool:
        """Say yes to the layers' parameters: transformers then leaves their shapes to `check`.

        5.17 does so anyway; in 5.23 its own error would not say which parameter it was.
        """
        return param_name in self.expected

    def is_serializable(self) -> bool:
        """Allow save_pretrained: it writes the tensors that were loaded."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Say no: the ops are for inference."""
        return False


class W4AFP8Config(QuantizationConfigMixin):  # type: ignore[misc]  # untyped
    """The quantization_config of a W4AFP8 checkpoint; keys without a meaning here are kept."""

    def __init__(self, **settings: Any) -> None:
        self.quant_method = "w4afp8"
        self.modules_to_not_convert = settings.pop("ignored_layers", None)
        for name, value in settings.items():
            setattr(self, name, value)


class W4AFP8Quantizer(FP8Quantizer):
    """As its base for linears; the experts have int4 weights and calibrated activation scales."""

    settings = {  # noqa: RUF012
        "weight_block_size": ((128, 128), [128, 128]),
        "group_size": (128,),
        "linear_activation_scheme": ("dynamic",),
        "moe_activation_scheme": ("static",),
    }
    dtypes = (torch.bfloat16,)

    def experts(self, num_experts: int, hidden_size: int, intermediate_size: int) -> nn.Module:
        """Return the layer for experts of these sizes."""
        return W4A8Experts(num_experts, hidden_size, intermediate_size, device="meta")

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        """Stack the experts' activation scales too, which the checkpoint calls w1, w2 and w3."""
        scales = [
            WeightConverter(
                source_patterns=f"mlp.experts.*.{name}.input_scale",
                target_patterns=f"mlp.experts.{name}_input_scale",
                operations=[MergeModulelist(dim=0)],
            )
            for name in ("w1", "w2", "w3")
        ]
        return [*super().update_weight_conversions(weight_conversions, *model), *scales]


def _sizes_of_experts(module: Any) -> tuple[int, int, int]:
    """Return the number of experts, hidden and intermediate size; raise unless ours can compute."""
    for name, value in _EXPERTS.items():
        if (found := getattr(module, name, value)) != value:
            raise IntegrationError(f"{name}: found {found}, needed {value}")
    gate = getattr(type(module), "_apply_gate", None)
    if gate is not None and gate.__name__ != "_default_apply_gate":
        raise IntegrationError(f"_apply_gate: found {gate.__qualname__}, needed silu(gate) * up")
    numbers = torch.linspace(-9, 9, 64, device="cpu")
    if not torch.allclose(module.act_fn(numbers), F.silu(numbers)):
        raise IntegrationError(f"act_fn: found {module.act_fn}, needed silu")
    num_experts, hidden_size, intermediate_size = module.down_proj.shape
    found, needed = module.gate_up_proj.shape, (num_experts, 2 * intermediate_size, hidden_size)
    if found != needed:
        raise IntegrationError(f"gate_up_proj.shape: found {tuple(found)}, needed {needed}")
    return num_experts, hidden_size, intermediate_size

"""Load quantised checkpoints into transformers models that compute with hwfuse: `register`.

    from hwfuse.integrations import quantized

    with quantized.registered():
        model = AutoModelForCausalLM.from_pretrained("deepseek-ai/DeepSeek-V3")

Two kinds of checkpoint, as they are published and on any device, a CPU included: DeepSeek's FP8
(``quant_method: fp8``, blocks of 128x128) and W4AFP8 (int4 experts in an FP8 model).  Linears
become `hwfuse.nn.FP8BlockLinear`, experts `FP8BlockExperts` or `W4A8Experts`; `save_pretrained`
writes the checkpoint again.

transformers has a quantizer of its own for ``fp8``, and only one can serve a method in a process:
`register` puts hwfuse's in its place, for checkpoints loaded from then on, until `unregister`.
Models that are loaded already stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["register", "registered", "unregister"]

_replaced: dict[str, Any] = {}  # what served the method before


def register() -> None:
    """Make `from_pretrained` use hwfuse for ``fp8`` and ``w4afp8`` checkpoints; again is nothing.

    Raises:
        ValueError: from transformers, if another library has registered ``w4afp8``.
    """
    from transformers.quantizers import auto

    from hwfuse.integrations import _quantizers

    if _replaced:
        return
    auto.register_quantization_config("w4afp8")(_quantizers.W4AFP8Config)
    auto.register_quantizer("w4afp8")(_quantizers.W4AFP8Quantizer)
    _replaced["fp8"] = auto.AUTO_QUANTIZER_MAPPING.pop("fp8")
    auto.register_quantizer("fp8")(_quantizers.FP8Quantizer)


def unregister() -> None:
    """Give ``fp8`` back to the quantizer that served it before, and forget ``w4afp8``."""
    from transformers.quantizers import auto

    if not _replaced:
        return
    auto.AUTO_QUANTIZER_MAPPING.update(fp8=_replaced.pop("fp8"))
    del auto.AUTO_QUANTIZER_MAPPING["w4afp8"]
    del auto.AUTO_QUANTIZATION_CONFIG_MAPPING["w4afp8"]


@contextmanager
def registered() -> Iterator[None]:
    """Register for the checkpoints that the block loads; keep it if it was registered before."""
    was_registered = bool(_replaced)
    register()
    try:
        yield
    finally:
        if not was_registered:
            unregister()

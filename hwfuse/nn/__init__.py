"""Layers that keep a quantised checkpoint's own parameters and compute with hwfuse's ops."""

from hwfuse.nn.fp8_block_experts import FP8BlockExperts
from hwfuse.nn.fp8_block_linear import FP8BlockLinear
from hwfuse.nn.w4a8_experts import W4A8Experts

__all__ = ["FP8BlockExperts", "FP8BlockLinear", "W4A8Experts"]

"""Weight layouts: checkpoint tensors to packed parameters, and back."""

from hwfuse.packing.preshuffle import preshuffle_16x16, unpreshuffle_16x16

__all__ = ["preshuffle_16x16", "unpreshuffle_16x16"]

"""Facts: checkable statements about a call, written as text and parsed here, once.

The same language serves the ``facts`` of an implementation and the ``when`` of a policy rule::

    m <= 64
    x.dtype in (bfloat16, float16)
    arch == sm90
    aligned(x, 16)

Names are the op's arguments, its sizes, and ``arch`` and ``vendor``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch

DTYPES: dict[str, torch.dtype] = {
    str(value).removeprefix("torch."): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype)
}
ARCH = re.compile(r"sm\d+[af]?|gfx\w+|cpu")
DEVICE_NAMES = frozenset({"arch", "vendor"})


def aligned(tensor: torch.Tensor, size: int) -> bool:
    """Tell whether the tensor's first element lies at a multiple of *size* bytes."""
    return tensor.data_ptr() % size == 0


def matches(scale: torch.Tensor, layout: str) -> bool:
    """Tell whether a scale lies in a layout of `hwfuse.layouts`."""
    from hwfuse import layouts

    return layouts.matches(scale, layout)


PREDICATES: dict[str, Any] = {"aligned": aligned, "matches": matches}


@dataclass(frozen=True)
class Fact:
    """One parsed statement.

    `reads`: what it looks at: a size or option by name, a tensor as ``x.dtype`` or, for anything
    beyond its dtype, as ``x``.
    """

    source: str
    reads: frozenset[str]
    tree: ast.expr = field(repr=False, compare=False)
    code: CodeType = field(repr=False, compare=False)

    @property
    def names(self) -> frozenset[str]:
        """The arguments, sizes and device words it speaks of."""
        return frozenset(read.partition(".")[0] for read in self.reads)

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Evaluate on a call's values.  An exception here is a bug and is not caught."""
        return bool(evaluate(self.code, values))


def evaluate(code: CodeType, values: Mapping[str, Any]) -> Any:
    """Run a compiled part of a fact on a call's values."""
    # The code holds only what `_fact_parser.read_by` let through: it can call nothing else.
    return eval(code, {"__builtins__": {}, **DTYPES, **PREDICATES}, dict(values))  # noqa: S307


def show(value: Any) -> Any:
    """Return a value as a fact would write it."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value

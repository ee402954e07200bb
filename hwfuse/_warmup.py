"""`hwfuse.warmup`: choose, import and compile before it matters."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from hwfuse import _explain, _op
from hwfuse._decision import Decision


def warmup(
    name: str,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **sizes: Any,
) -> list[Decision]:
    """Run an op once at each size, so that nothing is decided or compiled later.

    Call it before a CUDA graph capture, where a first call is refused, and before serving.

    Args:
        name: The op.
        device: Default: the current accelerator, otherwise the CPU.
        dtype: Passed to the spec's ``make_inputs``; default: its own.
        **sizes: Keywords of ``make_inputs``; a list stands for each of its values, several lists
            for all combinations: ``m=[1, 64, 4096]``.

    Returns:
        One decision per combination.
    """
    this = _op.op(name)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    values = [value if isinstance(value, list) else [value] for value in sizes.values()]
    decisions = []
    for combination in itertools.product(*values):
        chosen = dict(zip(sizes, combination, strict=True))
        arguments = _explain.inputs(this.spec, device=place, **options, **chosen)
        args, kwargs = this.spec.split(arguments)
        with torch.no_grad():
            this(*args, **kwargs)
        decisions.append(this.decide(arguments)[0])
    return decisions

"""The matrix: which inputs each implementation of an op is tried on."""

from __future__ import annotations

import inspect
import itertools
import os
import re
import runpy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hwfuse import InputError, _explain, _fact_parser, _facts, _variants
from hwfuse._implementation import Implementation
from hwfuse._spec import Spec

_MOST_ELEMENTS = 1 << 22  # of the inputs at a threshold: Triton's interpreter is slow
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Row:
    """One line of the matrix; see `row`."""

    axes: Mapping[str, tuple[Any, ...]]
    implied: tuple[str, ...] = ()

    def inputs(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield label and keywords of `make_inputs` for each combination of the axes' values."""
        for values in itertools.product(*self.axes.values()):
            chosen = dict(zip(self.axes, values, strict=True))
            keywords: dict[str, Any] = {}
            for axis, value in chosen.items():
                keywords |= value if isinstance(value, Mapping) else {axis: value}
            yield _label(chosen), keywords


Matrix = Mapping[str, Row]


def row(*, implied: tuple[str, ...] = (), **axes: Any) -> Row:
    """Write one line of a parity matrix: all combinations of the axes are tried.

    Args:
        implied: Facts of implementations that follow from the op's own checks, so that no input
            can break them.
        **axes: A keyword of the op's ``make_inputs`` to a value or a tuple of values.  Where a
            value is a dict, the axis is only a label and the dict holds several keywords.
    """
    return Row({k: v if isinstance(v, tuple) else (v,) for k, v in axes.items()}, implied)


def read(matrix: Matrix | str | os.PathLike[str] | None) -> Matrix:
    """Return a matrix: itself, ``MATRIX`` of a Python file, or an empty one."""
    if matrix is None or isinstance(matrix, Mapping):
        return matrix or {}
    found: Matrix = runpy.run_path(os.fspath(matrix))["MATRIX"]
    return found


def inputs(
    spec: Spec, line: Row | None, implementation: Implementation
) -> dict[str, dict[str, Any]]:
    """Return all inputs to try, label to keywords: first the line's, then around thresholds."""
    found = dict(line.inputs()) if line else _general(spec)
    base = most_rows(found)
    facts = (*implementation.requires.facts, *_variants.read(implementation).values())
    for name, number in itertools.chain(*map(_fact_parser.thresholds, facts)):
        for value in (number - 1, number, number + 1):
            keywords = {**base, name: value}
            if name in defaults(spec) and value >= 0:
                num_elements = _num_elements(spec, keywords)
                if num_elements is not None and num_elements <= _MOST_ELEMENTS:
                    found.setdefault(_label(keywords), keywords)
    return found


def most_rows(found: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the first inputs with the most rows."""
    return max(found.values(), key=lambda keywords: int(keywords.get("m", 0)))


def defaults(spec: Spec) -> dict[str, Any]:
    """Return the keywords of the op's `make_inputs` and their defaults."""
    return {n: p.default for n, p in inspect.signature(spec.make_inputs).parameters.items()}


def words_of(spec: Spec, option: str) -> tuple[str, ...]:
    """Ask the op's own check what an option may be: its error lists the words in quotes."""
    try:
        spec.sizes(**{**_explain.inputs(spec, device="meta"), option: "?"})
    except InputError as error:
        return tuple(re.findall(r"'(\w+)'", str(error.needed)))
    return ()


def _general(spec: Spec) -> dict[str, dict[str, Any]]:
    """Return inputs for an op without a line: each dtype, word and flag, at its usual sizes."""
    usual = defaults(spec)
    axes: dict[str, tuple[Any, ...]] = {"m": (0, 1, 37)}
    if usual["dtype"].is_floating_point:
        axes["dtype"] = _FLOATS
    for name, default in usual.items():
        if isinstance(default, bool):
            axes[name] = (False, True)
        if isinstance(default, str) and name in spec.parameters:
            axes[name] = words_of(spec, name) or (default,)
    every = row(**axes).inputs()
    return {
        label: keywords for label, keywords in every if _num_elements(spec, keywords) is not None
    }


def _num_elements(spec: Spec, keywords: Mapping[str, Any]) -> int | None:
    """Count the elements of a call's tensors; None if the op does not take them."""
    try:
        arguments = _explain.inputs(spec, device="meta", **keywords)
        spec.sizes(**arguments)
    except InputError:
        return None
    return sum(int(arguments[name].numel()) for name in spec.tensors)


def _label(values: Mapping[str, Any]) -> str:
    """Write ``bfloat16-m=37-interleaved``: dtypes and words alone, numbers with their names."""
    dtypes, others = [], []
    for name, value in values.items():
        if isinstance(value, torch.dtype):
            dtypes.append(str(_facts.show(value)))
        elif isinstance(value, Mapping):
            others.append(f"{name}=" + ",".join(str(_facts.show(v)) for v in value.values()))
        else:
            others.append(value if isinstance(value, str) else f"{name}={value}")
    return "-".join([*dtypes, *others])

"""Comparators: how near an output must come to the reference's.

An op's ``COMPARE`` names one for each output, with its numbers.  Each takes the tensors found and
expected and returns None or a description of the worst error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
_TOO_FAR = 1 << 40  # steps between a number and a NaN or an infinity


def compare(
    comparator: tuple[str, Mapping[str, Any]],
    found: Tensor,
    expected: Tensor,
    others: Mapping[str, Any],
) -> str | None:
    """Apply one entry of ``COMPARE``.

    Args:
        comparator: Its name and numbers.  A number that is a string names an entry of *others*.
            ``valid_rows`` restricts any comparator, see the function of that name.
        found: What the implementation gave.
        expected: What the reference gave.
        others: The arguments of the call and all outputs found, by name.
    """
    name, numbers = comparator
    if found.shape != expected.shape or found.dtype != expected.dtype:
        forms = (f"{x.dtype} {tuple(x.shape)}" for x in (found, expected))
        return "found {}, expected {}".format(*forms)
    values = {k: others[v] if isinstance(v, str) else v for k, v in numbers.items()}
    used = values.pop("valid_rows", None)
    found, expected = valid_rows(found, used), valid_rows(expected, used)
    return globals()[name](found, expected, **values)  # type: ignore[no-any-return]


def valid_rows(x: Tensor, used: Tensor | None) -> Tensor:
    """Return the rows of an output that its contract specifies; without *used*, all.

    *used*: ``expert_offsets``, whose last element counts them, or ``route_to_row``, in which each
    of them stands once.
    """
    if used is None:
        return x
    return x[: int(used[-1] if used.ndim == 1 else (used >= 0).sum())]


def bitwise(found: Tensor, expected: Tensor) -> str | None:
    """Require every bit, those of NaN payloads and of the sign of zero too."""
    return _describe(bits(found) != bits(expected), found, expected, "every bit must arrive")


def ulps(
    found: Tensor, expected: Tensor, *, max_ulps: int, share: float, float32: int | None = None
) -> str | None:
    """Allow a *share* of the elements to differ, each by *max_ulps* steps of its dtype at most.

    *float32*: if given, all elements of that dtype may differ, by so many steps: nothing rounds
    the sums that were taken in another order.  NaN matches any NaN, -0 matches 0, an infinity only
    itself.  Integers have no rounding and must be equal.
    """
    if not found.is_floating_point():
        return bitwise(found, expected)
    if float32 is not None and found.dtype == torch.float32:
        max_ulps, share = float32, 1.0
    return _steps_within(found, expected, max_ulps, share, "ulps")


def fp8_codes(found: Tensor, expected: Tensor, *, max_codes: int, share: float) -> str | None:
    """Allow a *share* of the fp8 codes to differ, by *max_codes* at most; otherwise as `ulps`."""
    if found.dtype not in _FP8:
        return f"found {found.dtype}, expected an fp8 type"
    return _steps_within(found, expected, max_codes, share, "codes")


def calc_diff(found: Tensor, expected: Tensor, *, bound: float) -> str | None:
    """Require DeepGEMM's metric ``1 - 2<x, y> / (|x|² + |y|²)`` to be below *bound*."""
    x, y, special = _numbers(found, expected)
    size = float((x * x + y * y).sum())
    value = 1 - 2 * float((x * y).sum()) / size if size else 0.0
    return special or _below(value, bound, found, expected, "calc_diff")


def rel_frobenius(
    found: Tensor,
    expected: Tensor,
    *,
    bound: float,
    scale: Tensor | None = None,
    computed: float | None = None,
) -> str | None:
    """Require ``|x - y| / |y|``, over the whole tensor, to be below *bound*.

    *computed*: the bound where *scale* is empty, so that the op computes it from what it rounded.
    """
    if computed is not None and scale is not None and not scale.numel():
        bound = computed
    x, y, special = _numbers(found, expected)
    error, size = float((x - y).norm()), float(y.norm())
    value = error / size if size else math.inf if error else 0.0
    return special or _below(value, bound, found, expected, "relative Frobenius error")


def same_sets(found: Tensor, expected: Tensor, *, groups: Tensor) -> str | None:
    """Require each group to have its own elements, in any order; *groups*: a label per element."""
    order = []
    for x in (found, expected):
        by_value = x.flatten().argsort(stable=True)
        order.append(by_value[groups.flatten()[by_value].argsort(stable=True)])
    x, y = found.flatten()[order[0]], expected.flatten()[order[1]]
    wrong = torch.zeros(found.numel(), dtype=torch.bool, device=found.device)
    wrong[order[0]] = x != y
    return _describe(wrong.view(found.shape), found, expected, "each group has its own elements")


def inverse(found: Tensor, expected: Tensor, *, of: Tensor) -> str | None:
    """Require ``found[of[i, j]] == i`` where ``of`` is not negative, and the expected elsewhere."""
    i, j = (of >= 0).nonzero(as_tuple=True)
    rows = of[i, j].long()
    outside = rows >= found.numel()
    if outside.any():
        return f"the map it inverts points to {int(rows.max())}, past the end {found.numel()}"
    wanted = expected.clone()
    wanted[rows] = i.to(wanted.dtype)
    return _describe(found != wanted, found, wanted, "both maps must agree")


def bits(x: Tensor) -> Tensor:
    """Return the elements' bits as integers."""
    return x.view(_INTEGERS[x.element_size()])


def _steps_within(
    found: Tensor, expected: Tensor, most: int, share: float, unit: str
) -> str | None:
    steps = _steps(found, expected)
    allowed = math.ceil(share * found.numel())
    worst = int(steps.max()) if steps.numel() else 0
    if worst > most:
        far = "NaN or infinite" if worst == _TOO_FAR else f"{worst} {unit} off"
        return _describe(steps > most, found, expected, f"worst {far}, allowed {most} {unit}")
    text = f"worst {worst} {unit} off; {allowed} elements may differ"
    return _describe(steps > 0, found, expected, text) if int((steps > 0).sum()) > allowed else None


def _steps(found: Tensor, expected: Tensor) -> Tensor:
    """Count the representable numbers from one to the other."""
    x, y = found.float(), expected.float()
    equal = (x == y) | (x.isnan() & y.isnan())
    steps = (_ordinal(found) - _ordinal(expected)).abs()
    steps[~(x.isfinite() & y.isfinite())] = _TOO_FAR
    steps[equal] = 0
    return steps


def _ordinal(x: Tensor) -> Tensor:
    """Return where in the order of its dtype's values each element is; both zeros are 0."""
    pattern = bits(x).long()
    magnitude = pattern & ((1 << (8 * x.element_size() - 1)) - 1)
    return torch.where(pattern < 0, -magnitude, magnitude)


def _numbers(found: Tensor, expected: Tensor) -> tuple[Tensor, Tensor, str | None]:
    """Return both in float64 with NaN and infinities 0, and an error if those do not agree."""
    x, y = found.double(), expected.double()
    special = ~(x.isfinite() & y.isfinite())
    wrong = special & (x != y) & ~(x.isnan() & y.isnan())
    text = _describe(wrong, found, expected, "NaN and infinities must agree")
    return x.masked_fill(special, 0.0), y.masked_fill(special, 0.0), text


def _below(value: float, bound: float, found: Tensor, expected: Tensor, what: str) -> str | None:
    if value < bound:
        return None
    error = (found.double() - expected.double()).abs().nan_to_num(0.0, posinf=0.0)
    return _describe(error == error.max(), found, expected, f"{what} {value:.3g}, bound {bound:g}")


def _describe(wrong: Tensor, found: Tensor, expected: Tensor, text: str) -> str | None:
    """Say how many elements are wrong, by how much, and where the first ones are."""
    count = int(wrong.sum())
    if not count:
        return None
    largest = float((found[wrong].double() - expected[wrong].double()).abs().max())
    where = [tuple(index) for index in wrong.nonzero()[:3].tolist()]
    examples = (f"{i}: found {found[i].item()}, expected {expected[i].item()}" for i in where)
    return (
        f"{text}; {count} of {found.numel()} elements are wrong, "
        f"largest error {largest:.4g}, first at " + "; ".join(examples)
    )

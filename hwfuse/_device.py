"""Which vendor and arch a torch device is, and which fp8 flavour it computes with."""

from __future__ import annotations

import re
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from hwfuse._errors import InputError

VENDORS = {"cuda": "nvidia", "rocm": "amd"}
_FNUZ_ARCHES = ("gfx940", "gfx941", "gfx942")  # CDNA3; every later arch has the OCP flavour


@dataclass(frozen=True)
class Target:
    """What a call runs on.  `vendor`: nvidia, amd, or torch's device type; `arch`: sm90, gfx942."""

    vendor: str
    arch: str

    def __str__(self) -> str:
        names = {vendor: name for name, vendor in VENDORS.items()}
        return f"{names[self.vendor]}:{self.arch}" if self.vendor in names else self.arch


# The target that CPU and meta tensors stand for: set by testing.pretend and by explain.
pretended: ContextVar[Target | None] = ContextVar("hwfuse_pretended", default=None)


def parse(text: str) -> Target:
    """Return the target that ``cuda:sm90``, ``rocm:gfx950`` or ``cpu`` names."""
    if text == "cpu":
        return Target("cpu", "cpu")
    name, _, arch = text.partition(":")
    pattern = {"cuda": r"sm\d+[af]?", "rocm": r"gfx\w+"}.get(name)
    if pattern is None or re.fullmatch(pattern, arch) is None:
        raise InputError("device", repr(text), "'cpu', 'cuda:sm90' or 'rocm:gfx950' style")
    return Target(VENDORS[name], arch)


def target_of(device: torch.device) -> Target:
    """Return what *device* is; CPU and meta tensors count as the pretended target, if any."""
    if device.type in ("cpu", "meta"):
        return pretended.get() or Target("cpu", "cpu")
    if device.type != "cuda":
        return Target(device.type, device.type)
    index = device.index if device.index is not None else torch.cuda.current_device()
    from hwfuse import _cuda

    return Target(*_cuda.vendor_and_arch(index))


def fp8_dtype(device: torch.device | str) -> torch.dtype:
    """Return the e4m3 flavour that *device* computes with: fnuz on gfx94x, otherwise e4m3fn.

    Args:
        device: A torch device, its name, or a target such as ``"rocm:gfx942"``.
    """
    if isinstance(device, str):
        is_target = device.partition(":")[2].startswith(("sm", "gfx"))
        target = parse(device) if is_target else target_of(torch.device(device))
    else:
        target = target_of(device)
    return torch.float8_e4m3fnuz if target.arch in _FNUZ_ARCHES else torch.float8_e4m3fn


# Dynamo runs a function so marked at trace time and keeps its result; the public decorator would
# import torch._dynamo (1 s).  If the mark is renamed, tests/core/test_compile.py fails.
fp8_dtype._dynamo_marked_constant = True  # type: ignore[attr-defined]

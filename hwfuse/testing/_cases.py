"""A case: one implementation on one kind of input, on a device that is here or pretended."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

import hwfuse
from hwfuse import _device, _explain, _facts, _packages, _state
from hwfuse._errors import HwfuseWarning
from hwfuse._implementation import Implementation
from hwfuse._spec import Spec
from hwfuse.testing._pretend import pretend

SEED = 0
# What CPU tensors pretend to be where the accelerator is missing: each fp8 flavour once.
_STAND_INS = {"nvidia": ("cuda:sm90",), "amd": ("rocm:gfx942", "rocm:gfx950")}


@dataclass(frozen=True)
class Place:
    """Where cases run: tensors on *device* count as *target*.  *missing*: why they cannot."""

    target: str
    device: str
    missing: str | None = None

    def entered(self) -> AbstractContextManager[None]:
        """Return the context to run in."""
        return self.on_meta() if self.device == "cpu" else nullcontext()

    def on_meta(self) -> AbstractContextManager[None]:
        """Return the context in which meta tensors count as the target."""
        return nullcontext() if self.target == "cpu" else pretend(self.target)

    def lacks(self, implementation: Implementation) -> str | None:
        """Say which packages of an implementation are missing here, or return None."""
        is_pretended = self.device == "cpu" != self.target
        missing = (_packages.missing(one, is_pretended) for one in implementation.requires.packages)
        return "; ".join(filter(None, missing)) or None


def places(implementation: Implementation, device: str | None) -> list[Place]:
    """Return where an implementation is tried: the real accelerator if it is here, or stand-ins.

    *device* restricts: a target such as ``"rocm:gfx950"``, or its first word.
    """
    vendor, arches = implementation.vendor, implementation.requires.arch
    real = _device.target_of(torch.device("cuda")) if torch.cuda.is_available() else None
    if vendor in (None, "cpu"):
        found = [Place("cpu", "cpu")]
        if real and vendor is None:
            found.append(Place(str(real), "cuda"))
    elif real and vendor == real.vendor and (not arches or real.arch in arches):
        found = [Place(str(real), "cuda")]
    elif vendor not in _STAND_INS:
        found = [Place(vendor, vendor, f"no {vendor} device is here")]
    elif device and ":" in device and _device.parse(device).vendor == vendor:
        found = [Place(device, "cpu")]
    else:
        prefix = _STAND_INS[vendor][0].partition(":")[0]
        wanted = [f"{prefix}:{arch}" for arch in arches]
        usual = [target for target in _STAND_INS[vendor] if not wanted or target in wanted]
        found = [Place(target, "cpu") for target in usual or wanted[:1]]
    return [p for p in found if device in (None, p.target, p.target.partition(":")[0])]


@dataclass(frozen=True)
class Case:
    """One implementation on the inputs that some keywords of `make_inputs` give, in one place."""

    op: str
    implementation: str
    place: Place
    keywords: Mapping[str, Any]

    @property
    def spec(self) -> Spec:
        """The op's spec."""
        return hwfuse.op(self.op).spec

    @property
    def record(self) -> Implementation:
        """What the registry knows of the implementation."""
        return _state.registry().implementations(self.op)[self.implementation]

    def arguments(self, device: str | None = None, **changes: Any) -> dict[str, Any]:
        """Make the call's arguments; inside of ``place.entered()``."""
        keywords = {**self.keywords, **changes, "device": device or self.place.device}
        return _explain.inputs(self.spec, **{"seed": SEED, **keywords})

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """Let the op run the implementation or nothing."""
        with warnings.catch_warnings(), hwfuse.using(**{self.op: self.implementation}):
            # That the reference is slow on an accelerator is no news here.
            warnings.simplefilter("ignore", HwfuseWarning)
            yield

    def error(self, text: str) -> ParityError:
        """Return the error to raise."""
        return ParityError(self, text)


class ParityError(AssertionError):
    """An implementation breaks its op's contract: `text` says how, `case` on which inputs."""

    def __init__(self, case: Case, text: str) -> None:
        super().__init__(case, text)
        self.case, self.text = case, text

    def __str__(self) -> str:
        place = self.case.place
        pretended = " (pretended)" if place.device == "cpu" != place.target else ""
        sizes = " ".join(f"{k}={_facts.show(v)}" for k, v in self.case.keywords.items())
        return (
            f"{self.case.op}: {self.case.implementation} on {place.target}{pretended}\n"
            f"  {self.text}\n  make_inputs: {sizes} seed={SEED}"
        )


class NotTaken(Exception):
    """Not a failure: the implementation rejects the inputs, or what it needs is not here."""

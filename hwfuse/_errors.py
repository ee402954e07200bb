"""Every error hwfuse raises on purpose; each says what was asked, what was found and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hwfuse._decision import Decision


class HwfuseWarning(UserWarning):
    """Something works, but not as the user asked: a missed preference, an unknown variable."""


class HwfuseError(Exception):
    """Base of all errors of hwfuse."""


class InputError(HwfuseError, ValueError):
    """An op was called with an argument outside its contract."""

    def __init__(self, argument: str, found: object, needed: str) -> None:
        super().__init__(argument, found, needed)
        self.argument, self.found, self.needed = argument, found, needed

    def __str__(self) -> str:
        return f"{self.argument}: found {self.found}, needed {self.needed}"


class UnknownOp(HwfuseError, LookupError):
    """No op has this name."""


class ConfigError(HwfuseError, ValueError):
    """A setting is wrong; the text starts with the file and line, variable or call that set it."""


class UnknownImplementation(ConfigError, LookupError):
    """A setting names an id whose backend is loaded and has no such provider."""


class BrokenImplementation(HwfuseError):
    """An implementation was chosen and its file cannot be imported or lacks its function."""


class NoImplementation(HwfuseError):
    """Every candidate rejected the call.  `decision` holds all reasons."""

    def __init__(self, text: str, decision: Decision | None = None) -> None:
        super().__init__(text)
        self.decision = decision


class PinnedUnavailable(NoImplementation):
    """The user pinned one implementation and it cannot take the call."""


class ColdCallInCapture(HwfuseError, RuntimeError):
    """The first call of its kind came inside a CUDA graph capture; run `hwfuse.warmup` before."""


class IntegrationError(HwfuseError):
    """A model or engine does not look as the integration needs it."""


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for a likely typo, otherwise an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""

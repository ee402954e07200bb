"""`hwfuse.record`: count what runs, for the duration of a block."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hwfuse import _state
from hwfuse._decision import Decision


class Record:
    """What ran while the block was open, in all threads.

    Attributes:
        calls: How often each (op, implementation id) ran, also from compiled code.
    """

    def __init__(self) -> None:
        self.calls: Counter[tuple[str, str]] = Counter()
        self._kinds: dict[tuple[Any, ...], Decision] = {}
        self._open = True
        self._lock = threading.Lock()

    @property
    def decisions(self) -> list[Decision]:
        """One decision for each kind of call."""
        return list(self._kinds.values())

    def note(self, decision: Decision) -> None:
        """Keep the decision if it is the first of its kind."""
        self._kinds.setdefault(decision.kind, decision)

    def counting(self, function: Callable[..., Any], op: str, chosen: str) -> Callable[..., Any]:
        """Return *function* with a counter in front."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if self._open:
                with self._lock:
                    self.calls[op, chosen] += 1
            return function(*args, **kwargs)

        return call

    def close(self) -> None:
        """Count no more: another thread may still hold a counting function."""
        self._open = False


@contextmanager
def record() -> Iterator[Record]:
    """Count every op call until the block ends.

    Every memo table is dropped at both ends, so outside the block a call costs what it always
    costs.  Bound ops (`Op.bind`) are not seen.

    Yields:
        A `Record`; read ``.calls`` and ``.decisions`` inside or after the block.
    """
    recorder = Record()
    _state.recorders.append(recorder)
    _state.forget()
    try:
        yield recorder
    finally:
        recorder.close()
        _state.recorders.remove(recorder)
        _state.forget()

"""What the commands print: lines, JSON, tables, progress.

On a terminal that has rich (extra ``cli``) tables and progress are drawn by it; otherwise, and in
pipes and files, they are aligned plain text.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO


def say(text: str = "") -> None:
    """Print one piece of text."""
    sys.stdout.write(text + "\n")


def complain(text: str) -> None:
    """Print one piece of text where errors go."""
    sys.stderr.write(text + "\n")


def emit(value: Any) -> None:
    """Print a value as JSON."""
    say(json.dumps(value, indent=2, ensure_ascii=False))


def heading(text: str) -> None:
    """Start a part of the screen."""
    say(f"\n{text}")


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under headers; an empty cell repeats what stands above it."""
    if _has_rich(sys.stdout):
        _rich_table(headers, rows)
        return
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    for row in (headers, *rows):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        say("  " + "  ".join(cells).rstrip())


def _rich_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, pad_edge=True, header_style="bold")
    for header in headers:
        drawn.add_column(header, overflow="fold")
    for row in rows:
        drawn.add_row(*map(Text, row))  # Text: a bracket in a cell is no markup
    Console().print(drawn)


@contextmanager
def progress(label: str) -> Iterator[Callable[[int, int, str], None]]:
    """Show how far long work is, on stderr; yields ``step(done, total, what)``."""
    if _has_rich(sys.stderr):
        from rich.console import Console
        from rich.markup import escape
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(label, total=None)

            def draw(done: int, total: int, what: str) -> None:
                text = f"{label} {escape(what)}"
                bar.update(task, completed=done, total=total, description=text)

            yield draw
    elif sys.stderr.isatty():
        yield _one_line(label)
        sys.stderr.write("\r\x1b[K")
    else:
        yield lambda _done, _total, _what: None


def _one_line(label: str) -> Callable[[int, int, str], None]:
    def draw(done: int, total: int, what: str) -> None:
        # 79: a longer line would wrap, and "back to its start" would then leave rubbish.
        sys.stderr.write("\r\x1b[K" + f"{label} {done}/{total} {what}"[:79])
        sys.stderr.flush()

    return draw


def _has_rich(stream: TextIO) -> bool:
    return stream.isatty() and importlib.util.find_spec("rich") is not None

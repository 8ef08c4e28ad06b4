"""The one place where words for people, tables and --json are printed. Rich is imported at the first print."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


class _Lazy:
    """Stands for rich's Console on standard output until one is needed: importing rich costs 60 ms."""

    def __init__(self) -> None:
        self._real: Console | None = None

    def __getattr__(self, name: str) -> Any:
        if self._real is None:
            from rich.console import Console

            wide = None if sys.stdout.isatty() else 160
            self._real = Console(width=wide, highlight=False, soft_wrap=True)
        return getattr(self._real, name)


console = _Lazy()


def say(text: str) -> None:
    """One plain line."""
    print(text, flush=True)


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str), flush=True)


def table(columns: list[str], rows: list[list[str]], title: str = "") -> None:
    """A table; plain columns when the output is a pipe."""
    if not sys.stdout.isatty():
        _plain_table(columns, rows, title)
        return
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=title or None, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for column in columns:
        drawn.add_column(column)
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    console.print(drawn)


def ago(moment: float | None) -> str:
    """How long ago a Unix time was, in one unit."""
    if moment is None:
        return "-"
    seconds = max(0.0, time.time() - moment)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def _plain_table(columns: list[str], rows: list[list[str]], title: str) -> None:
    if title:
        say(title)
    widths = [max(len(cell) for cell in column) for column in zip(columns, *rows, strict=True)]
    for row in [columns, *rows]:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())

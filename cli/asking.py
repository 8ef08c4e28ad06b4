"""A bar while questions are asked; plain lines in a pipe. All of it goes to standard error: reports go to output."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LINE_SECONDS = 10.0


@contextmanager
def asking(what: str, *, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Gives a `progress(done, total)`; rate and time left are shown while the block runs."""
    if quiet:
        yield lambda done, total: None
    elif sys.stderr.isatty():
        yield from _bar(what)
    else:
        yield _lines(what)


def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _lines(what: str) -> Callable[[int, int], None]:
    began = shown = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal began, shown
        now = time.monotonic()
        began = began or now  # at the first answer: before it an engine was started, which says nothing of the rate
        if now - shown > LINE_SECONDS or done == total:
            shown = now
            rate = (done - 1) / max(now - began, 1e-9)
            left = f", {rate:.1f} rows/s, eta {(total - done) / rate:.0f} s" if rate and done < total else ""
            print(f"{what}: {done}/{total}{left}", file=sys.stderr, flush=True)

    return progress

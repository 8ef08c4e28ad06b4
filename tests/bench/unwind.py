"""SIGTERM ends a benchmark as Ctrl-C does: servers that it has started end with it."""

from __future__ import annotations

import signal
import sys


def unwind_on_sigterm() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

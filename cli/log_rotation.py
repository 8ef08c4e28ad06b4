"""Logs that stay small: `x.log`, `x.log.1` and `x.log.2`, of about ten megabytes each at most.

The parts write to their files themselves, so that they and their last words outlive the supervisor; a pipe to it would
break with it. So a file that is full is copied and emptied under its writer, which appends and does not notice. A line
written between the two is lost.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

LIMIT_BYTES, OLD_FILES = 10_000_000, 2


def rotate(log: Path, limit: int = LIMIT_BYTES) -> bool:
    """Rotate it if it has more than `limit` bytes; of one that grew faster than it was looked at the end is kept."""
    with suppress(OSError):  # it is not there, or the disk is full: it will be tried again
        size = log.stat().st_size
        if size <= limit:
            return False
        partial = log.with_name(f"{log.name}.partial")
        with log.open("rb") as source, partial.open("wb") as target:
            source.seek(size - limit)
            shutil.copyfileobj(source, target, 1 << 20)
        for number in range(OLD_FILES, 1, -1):
            with suppress(FileNotFoundError):
                log.with_name(f"{log.name}.{number - 1}").replace(log.with_name(f"{log.name}.{number}"))
        partial.replace(log.with_name(f"{log.name}.1"))
        os.truncate(log, 0)
        return True
    return False

"""The `.env` of a project while a program runs: read again when it changes.

What the real environment sets wins over it, as at the start; what the program itself took from an older `.env` (or
was handed down so) does not.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from registry.errors import WrongInput
from registry.project import dotenv_file, dotenv_pairs, from_dotenv

LOOK_SECONDS = 1.0
Stamp = tuple[str, int, int, int]


def _print(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", flush=True)


class EnvFile:
    """`values`: the environment as it would be for a program that is started now. Never written to os.environ, which
    other threads read."""

    def __init__(self, root: Path, say: Callable[[str], None] = _print) -> None:
        self.root, self.values = root, dict(os.environ)
        self._say = say
        self._real = {name: value for name, value in os.environ.items() if name not in from_dotenv()}
        self._seen: Stamp | None = None
        self._before: Stamp | None = None
        self._said = ""
        self.look()

    def look(self) -> bool:
        """Read the file if it has changed; have the values changed? Never raises: of a broken one the last good one
        stays in force, and that is said once."""
        try:
            file = dotenv_file(self.root)
            stamp = _stamp(file) if file else None
            before, self._before = self._before, stamp
            # Editors empty a file before they write it, or put another in its place: nothing counts when it lasts.
            if stamp == self._seen or ((stamp is None or not stamp[-1]) and stamp != before):
                return False
            self._seen = stamp
            return self._put(dotenv_pairs(file) if file else {})
        except (OSError, WrongInput) as error:
            self._complain(f"the .env is broken, what it said before stays in force: {error}")
            return False

    def _put(self, written: Mapping[str, str]) -> bool:
        before, self.values, self._said = self.values, {**written, **self._real}, ""
        return self.values != before

    def _complain(self, what: str) -> None:
        if what != self._said:
            self._say(what)
            self._said = what


def _stamp(file: Path) -> Stamp:
    found = file.stat()
    return str(file), found.st_ino, found.st_mtime_ns, found.st_size

"""`.ft/up`: what the supervisor is to do, what it says of it, and the lock that says that it lives."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from cli.parts import Part
from registry.file_locks import alone, is_held, try_exclusive

LOCK_VARIABLE = "FT_UP_LOCK"
# up: well. waiting: it answers, but is not ready. elsewhere: on already, and somebody else started it.
FINE = ("up", "waiting", "elsewhere")


class UpFolder:
    """The files below a project's `home`. What is not there or cannot be read is as if nothing had been up."""

    def __init__(self, home: Path) -> None:
        self.home, self.folder = home, home / "up"
        self.lock = home / "up.lock"

    def take(self) -> int | None:
        """The supervisor's lock as a descriptor; None while a supervisor lives."""
        with alone(self.home / "up.guard"):
            fd = try_exclusive(self.lock)
            if fd is not None:
                os.ftruncate(fd, 0)  # the pid in it is a dead supervisor's
            return fd

    def is_up(self) -> bool:
        with alone(self.home / "up.guard"):
            return is_held(self.lock)

    def supervisor(self) -> int | None:
        """Its process; None while there is none, or none that has said so yet."""
        if not self.is_up():
            return None
        try:
            return int(self.lock.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def write_plan(self, parts: list[Part]) -> None:
        self._write("plan.json", [part.as_dict() for part in parts])

    def plan(self) -> list[Part]:
        """The parts that a supervisor was last started for."""
        try:
            return [Part.from_dict(each) for each in self._read("plan.json", [])]
        except (TypeError, KeyError):  # another version of ft wrote it
            return []

    def left_behind(self) -> list[Path]:
        """Locks of parts that live. Without a supervisor nobody looks after them."""
        return [lock for lock in sorted(self.folder.glob("*.lock")) if is_held(lock)]

    def write_status(self, pid: int, parts: list[dict[str, Any]]) -> None:
        self._write("status.json", {"pid": pid, "parts": parts})

    def now(self) -> list[dict[str, Any]]:
        """Each part as `Keeper.status` gives it. Without a supervisor what still lives is in state "left behind"."""
        said = self._read("status.json", {"pid": None, "parts": []})
        by_name = {each["name"]: each for each in said["parts"]}
        if not self.is_up():
            living = {lock.stem for lock in self.left_behind()}
            state = {name: "left behind" if name in living else "stopped" for name in by_name}
            return [{**each, "state": state[name]} for name, each in by_name.items()]
        if said["pid"] == self.supervisor():
            return list(by_name.values())
        return []  # the supervisor has not said anything yet

    def is_well(self) -> bool:
        """Is all on that is to be on?"""
        parts = self.now()
        return self.is_up() and bool(parts) and all(each["state"] in FINE for each in parts)

    def _write(self, name: str, body: Any) -> None:
        """For its owner only: the plan has keys in the environment of parts."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f".{name}.{os.getpid()}"
        partial.unlink(missing_ok=True)
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
            json.dump(body, out)
        partial.replace(self.folder / name)

    def _read(self, name: str, otherwise: Any) -> Any:
        try:
            return json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return otherwise

"""Small programs as parts, and a supervisor for them, of which nothing lives on after the block."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cli.part_process import left_behind
from cli.parts import Part, stamped
from cli.supervising import start_supervisor
from cli.up_folder import UpFolder
from registry.project import Project

# Each writes its process id where its health check looks for it, and a line into the file `lives`.
BEGIN = """
import os, signal, subprocess, sys, time
from pathlib import Path
def ready():
    Path(sys.argv[1]).write_text(str(os.getpid()))
def lives():
    with open(sys.argv[2], "a") as out:
        print(os.getpid(), time.time(), file=out)
lives()
"""
STAY = "ready()\nprint('hello', flush=True)\ntime.sleep(600)\n"
CRASH = "print('no card here', file=sys.stderr, flush=True)\nsys.exit(3)\n"
NEVER_READY = "time.sleep(600)\n"
DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nready()\ntime.sleep(600)\n"
WITH_CHILD = (
    "subprocess.Popen([sys.executable, '-c', BEGIN + 'time.sleep(600)', sys.argv[1] + '.child', sys.argv[2]])\n"
)


def part(project: Project, name: str, program: str, **more: Any) -> Part:
    ready, log = project.home / f"{name}.ready", project.logs / f"{name}.log"
    source = f"BEGIN = {BEGIN!r}\n{BEGIN}{program}"
    command = (sys.executable, "-c", source, str(ready), str(project.home / f"{name}.lives"))
    lock = str(project.home / "up" / f"{name}.lock")
    given: dict[str, Any] = {"health": str(ready), "stop_seconds": 5.0, **more}
    return stamped(Part(name, command, lock, str(log), str(project.root), **given))


@contextmanager
def supervised(project: Project, *parts: Part) -> Iterator[UpFolder]:
    up = UpFolder(project.home)
    try:
        assert start_supervisor(project, up, list(parts))
        yield up
    finally:
        kill_all(up)


def kill_all(up: UpFolder) -> None:
    """kill -9 of whatever a test has left."""
    until(lambda: not up.is_up() or up.supervisor() is not None, "the supervisor to say who it is")
    with suppress(ProcessLookupError):
        os.kill(up.supervisor() or 2**22 + 1, signal.SIGKILL)
    until(lambda: not up.is_up(), "the supervisor to be gone")
    for lock in up.left_behind():
        if found := left_behind(lock):
            os.killpg(found[0].pid, signal.SIGKILL)
    until(lambda: not up.left_behind(), "its parts to be gone")


def lives(project: Project, name: str) -> list[tuple[int, float]]:
    """Process id and time of each start."""
    path = project.home / f"{name}.lives"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [(int(line.split()[0]), float(line.split()[1])) for line in lines]


def state(up: UpFolder, name: str) -> dict[str, Any]:
    return next((each for each in up.now() if each["name"] == name), {"state": "", "pid": None, "error": ""})


def until(holds: Callable[[], object], what: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """Zombies are not: where process 1 does not take their status they stay."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False

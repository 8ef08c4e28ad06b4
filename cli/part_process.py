"""One part as a process: started with its lock, in a session of its own, and ended with everything in it.

The part inherits an open descriptor of its lock and writes its pid into the file before it becomes its program. So
whoever comes later, the next supervisor too, reads off the lock whether the part lives, and from the file which one
it is; there is no moment in which it lives unknown, whenever its supervisor is killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cli.parts import Part
from registry.file_locks import is_held, try_exclusive

POLL_SECONDS = 0.05
KILL_SECONDS = 10.0
MARK = "FT_UP_PART"


@dataclass(frozen=True)
class PartProcess:
    """`child` is None where another supervisor, dead by now, has started it."""

    pid: int
    lock: Path
    child: subprocess.Popen[bytes] | None = None

    def ended(self) -> str:
        """How it ended; '' while it lives."""
        if self.child is None:
            return "" if is_held(self.lock) else "ended"
        code = self.child.poll()
        if code is None:
            return ""
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def start(part: Part) -> PartProcess | None:
    """Start it. None where another process has one of its locks, be it for a moment. Raises OSError."""
    lock = try_exclusive(Path(part.lock))
    other = try_exclusive(Path(part.other_lock)) if part.lock_variable and lock is not None else None
    held = [fd for fd in (lock, other) if fd is not None]
    try:
        if lock is None or (part.lock_variable and other is None):
            return None
        return PartProcess(*_spawn(part, held, lock))
    finally:
        for fd in held:
            os.close(fd)


def _spawn(part: Part, held: list[int], lock: int) -> tuple[int, Path, subprocess.Popen[bytes]]:
    def sign() -> None:
        for fd in held:
            os.ftruncate(fd, 0)
            os.pwrite(fd, str(os.getpid()).encode(), 0)
        os.pwrite(lock, f" {part.stamp}".encode(), len(str(os.getpid())))

    handed = {part.lock_variable: str(held[-1])} if part.lock_variable else {}
    Path(part.log).parent.mkdir(parents=True, exist_ok=True)
    with Path(part.log).open("ab") as log:
        child = subprocess.Popen(
            part.command,
            cwd=part.cwd,
            env={**os.environ, **part.env, **handed, MARK: part.lock},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=held,
            preexec_fn=sign,  # noqa: PLW1509 (the supervisor has no threads)
        )
    return child.pid, Path(part.lock), child


def left_behind(lock: Path) -> tuple[PartProcess, str] | None:
    """The living part whose lock this is, with its stamp; None if none lives."""
    if not is_held(lock):
        return None
    pid, _, stamp = lock.read_text(encoding="utf-8").partition(" ")
    return (PartProcess(int(pid), lock), stamp) if pid.isdigit() else None


def stop(process: PartProcess, seconds: float, tick: Callable[[], None] = lambda: None) -> None:
    """Ask it and all of its session to end, kill what has not after so long, and return when it is really gone."""
    _signal(process.pid, signal.SIGTERM)
    _wait(process, seconds, tick)
    sweep(process)


def sweep(process: PartProcess) -> None:
    """Kill what is left of the part's session: MLflow's server lives on, on its port, when its parent is killed."""
    _signal(process.pid, signal.SIGKILL)
    _wait(process, KILL_SECONDS, lambda: None)


def sweep_remains(lock: Path) -> None:
    """The same where the part itself is gone and so is its supervisor; Linux only, because the pid proves nothing.

    Somebody else's session may have that number by now; one of ours has our lock's name in its environment.
    """
    with suppress(OSError, ValueError):
        pid = int(lock.read_text(encoding="utf-8").partition(" ")[0])
        if any(_is_of(lock, member) for member in _members(pid)):
            _signal(pid, signal.SIGKILL)
            _until(lambda: not _members(pid), KILL_SECONDS)


def _signal(group: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _wait(process: PartProcess, seconds: float, tick: Callable[[], None]) -> None:
    def gone() -> bool:
        tick()
        return bool(process.ended()) and not is_held(process.lock)

    _until(gone, seconds)


def _until(done: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not done() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def _members(group: int) -> list[int]:
    """Living processes of a process group; [] where there is no /proc."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError, ValueError):
            # After the name in parentheses, which may have blanks: state, parent, group.
            state, _, its = (
                (entry / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:3]
            )
            if int(its) == group and state not in ("Z", "X"):
                found.append(int(entry.name))
    return found


def _is_of(lock: Path, pid: int) -> bool:
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return f"{MARK}={lock}".encode() in environment

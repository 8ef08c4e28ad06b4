"""Process 1 of a pod: `python pod_keeper.py PIPE_FD PROGRAM [ARGUMENT...]`. Standard library only, run by its path.

A container ends as a whole. A process group would not do: the trainer that a pod starts leads a session of its own. So
this process adopts all orphans below it (Linux), and kills all that descends from it when its program ends, when it is
told (SIGUSR2), and when the pipe ends, whose other end only the stand-in holds: also when that was killed with -9.
SIGTERM goes to the program alone, as Docker does; SIGUSR1 freezes everything, as a machine does that hangs.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

BECOME_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER
# Blocked by whoever starts this, until they can be obeyed: before that they would kill it.
TOLD_BY = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def main() -> None:
    pipe, command = int(sys.argv[1]), sys.argv[2:]
    os.set_inheritable(pipe, False)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(BECOME_SUBREAPER, 1, 0, 0, 0)
    started: list[int] = []
    woken = _obey_signals(started)
    try:
        child = subprocess.Popen(command, preexec_fn=_unblock)  # noqa: PLW1509 -- there is one thread
    except OSError as error:
        print(f"cannot start {command[0]}: {error.strerror}", flush=True)
        sys.exit(127)
    started.append(child.pid)
    _unblock()
    while True:
        readable, _, _ = select.select([pipe, woken], [], [])
        if pipe in readable:
            _end(137)
        os.read(woken, 512)
        code = _reaped(child.pid)
        if code is not None:
            child.returncode = code
            _end(code)


def descendants(top: int) -> list[int]:
    """All living processes below `top`, itself not counted."""
    below: dict[int, list[int]] = {}
    for pid, parent, state in _processes():
        if state != "Z":
            below.setdefault(parent, []).append(pid)
    found, waiting = [], [top]
    while waiting:
        children = below.get(waiting.pop(), [])
        found += children
        waiting += children
    return found


def _obey_signals(started: list[int]) -> int:
    """Before anything is started. What comes back can be read after each signal."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: _send(signal.SIGTERM, started))
    signal.signal(signal.SIGUSR1, lambda *_: _signal_all(signal.SIGSTOP))
    signal.signal(signal.SIGUSR2, lambda *_: _end(137))
    return reading


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, TOLD_BY)


def _reaped(program: int) -> int | None:
    """Take leave of all that ended; the program's exit code, if it is among them."""
    code = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return code
        if not pid:
            return code
        if pid == program:
            code = os.waitstatus_to_exitcode(status)


def _end(code: int) -> None:
    """Kill what is left, again and again: a process may fork between the look and the kill."""
    while _signal_all(signal.SIGKILL):
        time.sleep(0.01)
        _reaped(0)
    os._exit(code if code >= 0 else 128 - code)


def _signal_all(number: int) -> int:
    return _send(number, descendants(os.getpid()))


def _send(number: int, pids: list[int]) -> int:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
    return len(pids)


def _processes() -> list[tuple[int, int, str]]:
    """(pid, parent, state) of every process."""
    if not Path("/proc/self/stat").exists():
        said = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,stat="], capture_output=True, text=True, check=True)
        rows = [line.split() for line in said.stdout.splitlines()]
        return [(int(pid), int(parent), state[0]) for pid, parent, state in rows]
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                # The name in brackets may have blanks and brackets of its own.
                state, parent = Path(entry.path, "stat").read_text().rpartition(")")[2].split()[:2]
            except (OSError, ValueError):
                continue
            found.append((int(entry.name), int(parent), state))
    return found


if __name__ == "__main__":
    main()

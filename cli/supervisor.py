"""`python -m cli.supervisor`: keeps the parts of `.ft/up/plan.json` on until SIGTERM; `ft up` starts it.

One thread, standard library only: it is to need next to nothing for as long as the machine runs.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from cli.log_rotation import rotate
from cli.part_keeper import Keeper
from cli.up_folder import LOCK_VARIABLE, UpFolder
from registry.project import find_project

IDLE_SECONDS, SHORTEST_SECONDS = 5.0, 0.05
# What a part that another supervisor has started says by its lock only, nobody is woken by.
ADOPTED_SECONDS = 1.0


class Supervisor:
    def __init__(self, up: UpFolder, lock: int, logs: Path) -> None:
        self.up, self.lock, self.logs = up, lock, logs
        self.keepers = [Keeper(part, _say) for part in up.plan()]
        self.stopping = False
        self._said: list[dict[str, Any]] = []
        self._rotated = 0.0

    def run(self) -> None:
        """Until asked to stop, or until the project's state is removed; then stop the parts, the last one first."""
        woken = self._listen()
        while not self.stopping and self._is_ours():
            for keeper in self.keepers:
                _step(keeper)
            self._tell()
            self._rotate()
            self._sleep(woken)
        _say("stopping")
        for keeper in reversed(self.keepers):
            keeper.stop(self._tell)
            self._tell()

    def _listen(self) -> socket.socket:
        """Signals wake the loop: a part that ends is seen at once, without looking all the time."""
        woken, waking = socket.socketpair()
        for end in (woken, waking):
            end.setblocking(False)
        signal.set_wakeup_fd(waking.fileno(), warn_on_full_buffer=False)
        self._waking = waking
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        return woken

    def _stop(self, *_: Any) -> None:
        self.stopping = True

    def _is_ours(self) -> bool:
        """After `rm -rf .ft` another supervisor may have begun there."""
        try:
            return os.path.samestat(os.stat(self.up.lock), os.fstat(self.lock))
        except OSError:
            _say("the project's state was removed")
            return False

    def _tell(self) -> None:
        now = [keeper.status() for keeper in self.keepers]
        if now != self._said:
            with suppress(OSError):  # a full disk is no reason to let the parts go
                self.up.write_status(os.getpid(), now)
                self._said = now

    def _rotate(self) -> None:
        if time.monotonic() - self._rotated > IDLE_SECONDS:
            self._rotated = time.monotonic()
            for log in [*(Path(keeper.part.log) for keeper in self.keepers), self.logs / "up.log"]:
                rotate(log)

    def _sleep(self, woken: socket.socket) -> None:
        now = time.monotonic()
        until = min((each.due for each in self.keepers), default=now + IDLE_SECONDS)
        longest = ADOPTED_SECONDS if any(each.adopted for each in self.keepers) else IDLE_SECONDS
        select.select([woken], [], [], min(max(until - now, SHORTEST_SECONDS), longest))
        with suppress(BlockingIOError):
            woken.recv(4096)


def _step(keeper: Keeper) -> None:
    """A defect in the care for one part must not be the end of all others."""
    try:
        keeper.step()
    except Exception:
        traceback.print_exc()
        keeper.due = time.monotonic() + IDLE_SECONDS


def _say(text: str) -> None:
    with suppress(OSError):
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", flush=True)


def main() -> int:
    project = find_project()
    up = UpFolder(project.home)
    given = os.environ.pop(LOCK_VARIABLE, "")
    lock = int(given) if given else up.take()
    if lock is None:
        _say("a supervisor of this project is on already")
        return 1
    os.set_inheritable(lock, False)
    os.pwrite(lock, str(os.getpid()).encode(), 0)
    _say(f"supervising {project.root} (pid {os.getpid()})")
    Supervisor(up, lock, project.logs).run()
    _say("stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Keeps one part on: starts it, looks after it, and starts it again when it ends, later each time."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from cli.follow_up import FollowUp
from cli.part_health import ask, last_words, log_size
from cli.part_process import PartProcess, left_behind, start, stop, sweep, sweep_remains
from cli.parts import Part, is_free
from registry.file_locks import is_held

# up: well. waiting: it answers, but is not ready. unwell: it was up, and does not answer. down: to be started again.
# elsewhere: one of its kind is on that somebody else started.
State = Literal["starting", "up", "waiting", "unwell", "down", "elsewhere", "stopping", "stopped"]
FIRST_DELAY, LONGEST_DELAY = 1.0, 60.0
# So long a part must have been up for its next end to count as the first.
LIVED_SECONDS = 60.0
# So long one that was up may be silent before it is ended.
SILENT_SECONDS = 60.0
# What does not answer has nothing to drain, and all other parts wait meanwhile.
HUNG_SECONDS = 10.0
LOOK_SECONDS, QUICK_SECONDS = 5.0, 0.5


class Keeper:
    """`step` is called again and again; `due` says when the next call is worth while (monotonic seconds)."""

    def __init__(self, part: Part, say: Callable[[str], None]) -> None:
        self.part, self.say = part, say
        self.process: PartProcess | None = None
        self.state: State = "starting"
        self.since, self.starts, self.error, self.note = time.time(), 0, "", ""
        self.failures, self.due = 0, 0.0
        self._began = self._well_since = self._heard = 0.0
        self._log_from = 0
        self._follow_up = FollowUp(part)

    def step(self) -> None:
        """Do what is to be done now. Raises nothing that one part's trouble could be."""
        if self.process is None:
            self._come_up()
        elif how := self.process.ended():
            self._lost(how)
        elif time.monotonic() >= self.due:
            self._look(self.process)
        self._follow_up.step()

    @property
    def adopted(self) -> bool:
        return self.process is not None and self.process.child is None

    def stop(self, tick: Callable[[], None]) -> None:
        """End it, and return when it is gone. One that somebody else started is left alone."""
        if self.process is not None:
            self._become("stopping")
            tick()
            stop(self.process, self.part.stop_seconds, tick)
        self._follow_up.stop()
        self._hush()
        self.process = None
        self._become("stopped")

    def status(self) -> dict[str, Any]:
        """What people see of it; `since` is a Unix time, `error` why it was last down."""
        return {
            "name": self.part.name,
            "state": self.state,
            "pid": self.process.pid if self.process else None,
            "since": self.since,
            "restarts": max(0, self.starts - 1),
            "failures": self.failures,
            "address": self.part.address,
            "note": self.note or self._follow_up.trouble,
            "error": self.error,
            "log": self.part.log,
        }

    def _come_up(self) -> None:
        if time.monotonic() < self.due:
            return
        if self._takes_over():
            return
        self._log_from = log_size(self.part.log)
        if self.part.other_lock and is_held(Path(self.part.other_lock)):
            self._stand_by()
        elif self.part.listens and not is_free(*self.part.listens):
            host, port = self.part.listens
            self._fail(f"port {port} of {host} is in use by another program")
        else:
            self._start()

    def _takes_over(self) -> bool:
        """One that a dead supervisor started is kept if it is what is wanted, and ended if not."""
        lock = Path(self.part.lock)
        if not is_held(lock):
            sweep_remains(lock)
            return False
        found = left_behind(lock)
        if found is None:  # it is just being born
            self.due = time.monotonic() + QUICK_SECONDS
        elif found[1] == self.part.stamp:
            self.say(f"{self.part.name}: still on (pid {found[0].pid}), taken over")
            self._begin(found[0])
        else:
            self.say(f"{self.part.name}: on with other settings (pid {found[0].pid}), started anew")
            stop(found[0], self.part.stop_seconds)
        return True

    def _stand_by(self) -> None:
        if self.state != "elsewhere":
            self.note = "on already, started by somebody else"
            self._become("elsewhere", self.note)
        self.due = time.monotonic() + 1.0

    def _start(self) -> None:
        try:
            process = start(self.part)
        except (OSError, subprocess.SubprocessError) as error:
            self._fail(f"cannot be started: {error}")
            return
        if process is None:  # somebody looked at the lock in that moment
            self.due = time.monotonic() + QUICK_SECONDS
        else:
            self._begin(process)

    def _begin(self, process: PartProcess) -> None:
        self.process, self.starts = process, self.starts + 1
        self._began = self._heard = time.monotonic()
        self._well_since, self.note, self.due = 0.0, "", 0.0
        self._become("starting", f"pid {process.pid}")

    def _look(self, process: PartProcess) -> None:
        now = time.monotonic()
        answer = ask(self.part, process.pid)
        self.due = now + (LOOK_SECONDS if answer == "well" else QUICK_SECONDS)
        if answer == "well":
            self._heard = now
            self._well(now)
        elif answer:
            self._heard, self.note, self._well_since = now, answer, 0.0
            if self.state != "waiting":
                self._become("waiting", answer)
        else:
            self._silent(process, now)

    def _well(self, now: float) -> None:
        self.note = ""
        if self.state != "up":
            self._well_since = now
            self._announce()
            self._follow_up.begin()
            self._become("up", self.part.address)
        elif now - self._well_since > LIVED_SECONDS:
            self.failures = 0

    def _silent(self, process: PartProcess, now: float) -> None:
        has_answered = self.state != "starting"
        if has_answered and self.state != "unwell":
            self._become("unwell", "does not answer")
        patience = SILENT_SECONDS if has_answered else self.part.start_seconds
        if now - self._heard > patience:
            stop(process, min(self.part.stop_seconds, HUNG_SECONDS))
            self._lost(f"was ended: it did not answer for {patience:.0f} s")

    def _lost(self, how: str) -> None:
        assert self.process is not None
        sweep(self.process)
        self.process = None
        self._follow_up.stop()
        self._hush()
        self._fail(f"{how}{last_words(self.part.log, self._log_from)}")

    def _fail(self, error: str) -> None:
        delay = min(LONGEST_DELAY, FIRST_DELAY * 2.0 ** min(self.failures, 10))
        self.failures, self.error, self.note = self.failures + 1, error, ""
        self.due = time.monotonic() + delay
        self._become("down", f"{error}\n  again in {delay:.0f} s")

    def _become(self, state: State, why: str = "") -> None:
        self.state, self.since = state, time.time()
        self.say(f"{self.part.name}: {state}{': ' if why else ''}{why}")

    def _announce(self) -> None:
        if self.part.announce:
            with suppress(OSError):
                partial = Path(self.part.announce + ".partial")
                partial.write_text(self.part.address, encoding="utf-8")
                partial.replace(self.part.announce)

    def _hush(self) -> None:
        if self.part.announce:
            with suppress(OSError):
                Path(self.part.announce).unlink(missing_ok=True)

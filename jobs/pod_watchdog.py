"""The watchdog of a pod: whether it may go on. It needs nobody outside: without a word from us a pod still ends.

The permit's end is told on the bucket's clock, which is carried on here by our own monotonic one between two looks: a
pod whose clock is wrong, or whose bucket is away, ends in time all the same.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from registry.errors import BucketError
from registry.job_bucket import JobBucket, LeaseWatch, Permit, attempt_of, pod_of
from registry.job_folder import Held

BUSY_GPU, BUSY_CORES = 0.02, 0.02
SAMPLE_SECONDS = 10.0  # processor time is counted in hundredths of a second: a short window sees none, or a lot


@dataclass(frozen=True)
class Limits:
    """Seconds. `grace` from SIGTERM to SIGKILL, and `end` from the decision to the pod's own end, uploads included."""

    look: float = 3.0
    start: float = 1200.0
    idle: float = 1200.0
    quiet: float = 600.0
    grace: float = 25.0
    end: float = 50.0


@dataclass(frozen=True)
class Seen:
    """One look: `now` on the bucket's clock; for how long (seconds) the pod is up, its lease still, its card idle."""

    attempt: int
    up: float
    permit: Permit | None = None
    now: float | None = None
    held: Held | None = None
    pod: str = ""
    quiet: bool = False
    idle: float = 0.0


def why_end(seen: Seen, limits: Limits) -> str:
    """The reason for which the pod must end; '' while it may go on."""
    if seen.now is None:
        return "the bucket was never reached" if seen.up > limits.start else ""
    if seen.permit is None:
        return "there is no permit"
    if seen.permit.attempt != seen.attempt:
        return f"the job has been given to pod number {seen.permit.attempt}"
    if seen.now >= seen.permit.until:
        return f"the permit is over{': ' + seen.permit.reason if seen.permit.reason else ''}"
    if seen.now >= seen.permit.deadline:
        return "the deadline has passed"
    ours = seen.held is not None and (attempt_of(seen.held.lease), pod_of(seen.held.lease)) == (seen.attempt, seen.pod)
    if not ours and seen.up > limits.start:
        return f"no trainer has claimed the job in {limits.start:.0f} s"
    if ours and seen.quiet:
        return f"the trainer has not renewed its lease for {limits.quiet:.0f} s"
    if seen.idle > limits.idle:
        return f"the card has been idle for {limits.idle:.0f} s"
    return ""


class Watchdog:
    """`watch` looks at the bucket, in a thread of its own; `why` decides by what was seen last, and never waits.

    `trainer` gives the pid of the trainer while there is one.
    """

    def __init__(
        self, remote: JobBucket, limits: Limits, trainer: Callable[[], int | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.remote, self.limits, self.clock = remote, limits, clock
        self.began = clock()
        # The permit, and the offset from our clock to the bucket's: set as one, because two threads use them.
        self.seen: tuple[Permit | None, float] | None = None
        self.held: Held | None = None
        self.still = LeaseWatch(limits.quiet, clock)
        self.quiet = False
        self.usage = Usage(trainer, clock)

    def watch(self) -> None:
        """For ever. A look at a bucket that hangs may take minutes."""
        while True:
            self.look()
            time.sleep(self.limits.look)

    def look(self) -> None:
        """A bucket that is away changes nothing of what was known."""
        with suppress(BucketError):
            self._look_at_permit()
            self.held = self.remote.lease()
            self.quiet = self.still.is_expired(self.held)

    def why(self) -> str:
        """Why the pod must end; '' while it may go on."""
        return why_end(self._seen(), self.limits)

    def _look_at_permit(self) -> None:
        before = self.clock()
        found = self.remote.permit()
        # The answer's clock is of some moment since `before`, in whole seconds: taken as late as it can be.
        self.seen = (found[0], found[1] + 1.0 - before) if found else (None, 0.0)

    def _seen(self) -> Seen:
        permit, offset = self.seen or (None, None)
        now = None if offset is None else offset + self.clock()
        return Seen(
            attempt=self.remote.attempt, up=self.clock() - self.began, permit=permit, now=now, held=self.held,
            pod=self.remote.pod, quiet=self.quiet, idle=self.usage.idle(),
        )  # fmt: skip


class Usage:
    """For how long the trainer's cards were idle: the GPUs' own figures, or its processor time where there are none."""

    def __init__(self, trainer: Callable[[], int | None], clock: Callable[[], float] = time.monotonic) -> None:
        self.trainer, self.clock = trainer, clock
        self.gpus = _gpus()
        self.busy_at, self.seen_at, self.spent = clock(), clock(), 0.0

    def idle(self) -> float:
        """Seconds; 0 while no trainer runs."""
        pid, now = self.trainer(), self.clock()
        if pid is None or (now - self.seen_at > SAMPLE_SECONDS and self._is_busy(pid, now)):
            self.busy_at = now
        return now - self.busy_at

    def _is_busy(self, pid: int, now: float) -> bool:
        gone, self.seen_at = now - self.seen_at, now
        if self.gpus:
            return any(_utilisation(each) > BUSY_GPU for each in self.gpus)
        before, self.spent = self.spent, _processor_seconds(pid)
        return (self.spent - before) / gone > BUSY_CORES


def _gpus() -> list[Any]:
    import pynvml

    try:
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []


def _utilisation(gpu: Any) -> float:
    """A share. A GPU that does not tell counts as busy: no pod is ended for what nobody knows."""
    import pynvml

    try:
        return float(pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu) / 100
    except pynvml.NVMLError:
        return 1.0


def _processor_seconds(pid: int) -> float:
    """Of a process and its children, those that have ended too; 0 if it is gone. Who evaluates only waits for vLLM."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        started = [each for task in Path(f"/proc/{pid}/task").glob("*/children") for each in task.read_text().split()]
    except OSError:
        return 0.0
    own = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return own + sum(_processor_seconds(int(each)) for each in started)

"""A target whose trainers do what a script says, at once: for the watch over a job, without seconds of torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.targets.target import Poll
from registry.job_folder import Held, JobFolder

# What a trainer does when it is looked at: an accepted result, 'die', 'die early' (before its claim), or it goes on.
Act = dict[str, Any] | str


@dataclass
class ScriptedTarget:
    """Each launch takes the next of `acts`; `busy` launches before that find the card taken.

    `used` has the train section that each trainer saw. A trainer that goes on reports `lines` of progress first, and
    stops when it is asked to.
    """

    acts: list[Act]
    busy: int = 0
    used: list[dict[str, Any]] = field(default_factory=list)
    on_launch: Callable[[JobFolder], None] = lambda job: None
    working: Held | None = None

    def launch(self, folder: Path) -> bool:
        if self.busy:
            self.busy -= 1
            return False
        if self.working:
            return False
        job, act = JobFolder(folder), self.acts.pop(0)
        self.used.append(job.recipe()["train"])
        self.on_launch(job)
        if act == "die early":
            return True
        held = job.claim("scripted", job.lease())
        if isinstance(act, dict):
            job.accept(held, act)
        elif act == "progress and die":
            job.add_progress(held.lease.epoch, 1, [{"step": held.lease.epoch}])
        elif act == "go on":
            self.working = held
        return True

    def poll(self, folder: Path) -> Poll:
        job = JobFolder(folder)
        if self.working:
            return Poll("running")
        if result := job.result():
            return Poll("done", result)
        return Poll("lost") if job.lease() else Poll("waiting", note=self.waits_for(folder))

    def waits_for(self, folder: Path) -> str:
        return "card scripted is held by somebody" if self.busy else "starting"

    def fetch(self, folder: Path, target: Path) -> None: ...

    def cancel(self, folder: Path, reason: str) -> None:
        job = JobFolder(folder)
        if self.working:
            job.accept(self.working, {"status": "stopped", "message": reason, "steps": 3})
            self.working = None
        job.withdraw_stop()

"""Watching one job on its target until it is done: trainers are started, counted, tried again and told of as events."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.retries import advice, next_attempt
from jobs.steps import Bench, State
from jobs.targets.target import Poll, Target
from registry import runs
from registry.errors import JobError, TimedOut
from registry.events import RUNS, append, by_run, new_event
from registry.job_folder import JobFolder
from registry.recipe import Finetune

WATCH_SECONDS = 0.3
CLOCK_SECONDS = 5.0
MESSAGE = 500


class JobWatch:
    """One worker's watch of one job. `card` is the name of the card that its trainers use."""

    def __init__(self, bench: Bench, run_id: str, recipe: Finetune, target: Target, card: str) -> None:
        self.bench, self.run_id, self.recipe, self.target, self.card = bench, run_id, recipe, target, card
        self.folder = bench.project.job_folder(run_id)
        self.job = JobFolder(self.folder)
        self.clock = TrainClock(self.folder / "clock.json")
        held = self.job.lease()
        # Of a trainer that is (or was) at work: epoch of the result that was accepted before it; None without one.
        self.flying: int | None = 0 if held and held.lease.result is None else None
        self.lost, self.reported = 0, 0
        self.told: set[str] = set()

    async def until_done(self) -> State:
        """The accepted result. Raises JobError, TimedOut; tries again as the recipe's `retries` say."""
        if not self._is_over_time():
            self.job.withdraw_stop()  # of a worker that was killed while it stopped a trainer
        while True:
            poll = await asyncio.to_thread(self.target.poll, self.folder)
            await asyncio.to_thread(self._tell, poll)
            if poll.state == "done" and (result := await asyncio.to_thread(self._final, poll)):
                return result
            if poll.state == "running":
                await asyncio.to_thread(self._running)
            else:
                await asyncio.to_thread(self._launch, poll)
            if self._is_over_time():
                return await self._stop_for_time()
            kind = "waiting" if poll.state == "waiting" else "training"
            await self.bench.outside(kind, asyncio.sleep(WATCH_SECONDS))

    async def stop(self, reason: str) -> None:
        """Checkpoint-then-stop; returns when the trainer is really gone, and so its card free."""
        await asyncio.to_thread(self.target.cancel, self.folder, reason)
        await asyncio.to_thread(self._tell, Poll("done", self.job.result()))

    def _final(self, poll: Poll) -> State | None:
        """The result if it counts; None while the job goes on: tried again by itself, or resumed by a person."""
        result, epoch = poll.result or {}, self.job.accepted()
        if result["status"] == "ok":
            return result
        attempts = self.job.attempts()
        if attempts and attempts[-1]["after"] == epoch:
            return None
        train = self.job.recipe()["train"]
        if result["status"] == "failed":
            change = next_attempt(self.recipe.retries, train, result, epoch, attempts)
            if change:
                self._try_again(change)
                return None
        if (self.folder / "result.json").stat().st_mtime < self.bench.started:
            return None
        raise _error(result, train, self.folder)

    def _try_again(self, change: dict[str, Any]) -> None:
        if change["anew"]:
            self.job.prune_checkpoints(keep=0)
        self._say("job.retried", change["after"], change)
        self.job.add_attempt(change)

    def _running(self) -> None:
        if self.flying is None:
            self.flying = self.job.accepted()
        runs.set_stage(self.bench.store, self.run_id, "train")
        self.clock.tick()

    def _launch(self, poll: Poll) -> None:
        """Start a trainer, if its card is free. One that has ended without a result counts as lost."""
        self.clock.halt()
        if self.flying is not None:
            if self.job.accepted() <= self.flying:
                self._count_lost()
            self.flying = None
        before = self.job.accepted()
        if self.target.launch(self.folder):
            self.flying = before
        runs.set_stage(self.bench.store, self.run_id, f"train: {self.target.waits_for(self.folder)}")

    def _count_lost(self) -> None:
        # Only trainers that died without having got any further count against the job.
        further, self.reported = len(self.job.progress_files()) > self.reported, len(self.job.progress_files())
        self.lost = 0 if further else self.lost + 1
        held = self.job.lease()
        epoch = held.lease.epoch if held and held.lease.result is None else 0
        self._say("job.lost", epoch, {"epoch": epoch})
        if self.lost > self.recipe.retries.lost:
            raise JobError(
                f"the trainer died {self.lost} times", place=str(self.job.log),
                fix=f"read it with `ft logs {self.run_id}`, then `ft resume {self.run_id}`; one that the system killed "
                "for want of memory needs a smaller train.batch",
            )  # fmt: skip
        self._say("job.retried", epoch, {"after": epoch, "class": "lost", "train": {}, "anew": False})

    def _is_over_time(self) -> bool:
        limit = self.recipe.timeouts.of("train")
        return limit is not None and self.clock.used > limit

    async def _stop_for_time(self) -> State:
        limit = self.recipe.timeouts.train
        runs.set_stage(self.bench.store, self.run_id, f"train: stopping after {limit}")
        await self.stop(f"timeouts.train is {limit}")
        self.clock.forget()
        result = self.job.result() or {}
        if result.get("status") == "ok":  # it was about to end
            return result
        steps = f" after step {result['steps']}" if "steps" in result else ""
        raise TimedOut(
            f"training was stopped{steps}: it took longer than timeouts.train ({limit})", place=str(self.job.log),
            fix=f"`ft resume {self.run_id}` goes on from the checkpoint, with as much time again",
        )  # fmt: skip

    def _tell(self, poll: Poll) -> None:
        """Events of a trainer's life, as it is seen."""
        held = self.job.lease()
        if held is None:
            return
        epoch, result = held.lease.epoch, poll.result or {}
        if poll.state == "running" and held.lease.result is None:
            self._say("job.started", epoch, {"card": self.card, "epoch": epoch})
        elif poll.state == "done" and result:
            type_ = {"ok": "job.finished", "stopped": "job.stopped"}.get(result["status"], "job.failed")
            self._say("job.started", epoch, {"card": self.card, "epoch": epoch})
            self._say(type_, epoch, {"epoch": epoch, **_facts(type_, result)})

    def _say(self, type_: str, epoch: int, data: dict[str, Any]) -> None:
        """Append, once for each trainer; epoch 0 is one that died before it had a number."""
        key = f"{self.run_id}/{type_}/{epoch}" if epoch else ""
        if key and key in self.told:
            return
        append(self.bench.store, new_event(RUNS, type_, self.run_id, data, key=key, cause=by_run(self.run_id)))
        self.told.add(key)


@dataclass
class TrainClock:
    """Seconds in which trainers were at work, kept in a file, because the worker may die meanwhile."""

    path: Path
    used: float = 0.0
    _at: float | None = field(default=None, repr=False)
    _written: float = field(default=0.0, repr=False)

    def __post_init__(self) -> None:
        with suppress(OSError, ValueError, KeyError, TypeError):
            self.used = float(json.loads(self.path.read_text(encoding="utf-8"))["used"])

    def tick(self) -> None:
        now = time.monotonic()
        self.used += now - self._at if self._at is not None else self._unseen()
        self._at = now
        if now - self._written > CLOCK_SECONDS:
            self._write()

    def halt(self) -> None:
        """No trainer is at work."""
        if self._at is not None:
            self._at = None
            self._write()

    def forget(self) -> None:
        self.used, self._at = 0.0, None
        self.path.unlink(missing_ok=True)

    def _unseen(self) -> float:
        """A trainer that is at work at the first look has gone on since the file was written."""
        try:
            return max(0.0, time.time() - float(json.loads(self.path.read_text(encoding="utf-8"))["at"] or time.time()))
        except (OSError, ValueError, KeyError, TypeError):
            return 0.0

    def _write(self) -> None:
        self._written = time.monotonic()
        at = time.time() if self._at is not None else None
        partial = self.path.with_suffix(".partial")
        with suppress(OSError):  # a full disk ends the run where the checkpoint is saved
            partial.write_text(json.dumps({"used": round(self.used, 3), "at": at}), encoding="utf-8")
            partial.replace(self.path)


def _facts(type_: str, result: State) -> dict[str, Any]:
    if type_ == "job.failed":
        return {"class": str(result.get("class")), "message": str(result.get("message"))[:MESSAGE]}
    if type_ == "job.stopped":
        return {"reason": str(result.get("message")), "steps": int(result.get("steps") or 0)}
    return {name: result[name] for name in ("steps", "seconds", "peak_memory") if name in result}


def _error(result: State, train: dict[str, Any], folder: Path) -> JobError:
    kind = str(result.get("class") or result.get("status"))
    what = f"training failed ({kind}): {result.get('message')}"
    return JobError(what, place=str(folder / "log.txt"), fix=advice(kind, train))

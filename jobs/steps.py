"""What all steps of a run share: the project's parts, and a record of each attempt with where its time went."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from dbos import DBOS

from jobs.outages import repeated, through_outage
from registry import runs
from registry.adapters import promotions
from registry.errors import FtError, StoreError, TimedOut
from registry.project import Project
from registry.recipe import Finetune
from registry.run_control import Timeouts
from registry.settings import Settings
from registry.store import Store

State = dict[str, Any]
Value = TypeVar("Value")
_at_work: set[str] = set()


@dataclass
class Bench:
    """The parts a step works with. `spent` is seconds of its time that went to outside work, by kind."""

    project: Project
    store: Store
    settings: Settings
    started: float = 0.0
    spent: dict[str, float] = field(default_factory=dict)

    def run(self, run_id: str) -> runs.Run:
        return runs.get(self.store, run_id)

    def recipe(self, run_id: str) -> Finetune:
        return Finetune.model_validate(self.run(run_id).body)

    def promoted_at(self, subject: str) -> float:
        """When that version was last made champion (Unix time)."""
        model, _, version = subject.partition("@")
        moves = [each.created for each in promotions(self.store, model) if each.version == int(version)]
        return moves[-1] if moves else 0.0

    def note_outside(self, kind: str, seconds: float) -> None:
        self.spent[kind] = self.spent.get(kind, 0.0) + seconds

    async def outside(self, kind: str, work: Awaitable[Value]) -> Value:
        """Await work that is not the platform's own, and count its time."""
        started = time.monotonic()
        try:
            return await work
        finally:
            self.note_outside(kind, time.monotonic() - started)


class _Current:
    """The bench of this process, set once by the worker before DBOS starts."""

    def __init__(self) -> None:
        self._bench: Bench | None = None

    def set(self, bench: Bench) -> None:
        self._bench = bench

    def get(self) -> Bench:
        assert self._bench is not None, "bind() comes before launch()"
        return self._bench

    def fresh(self) -> Bench:
        bench = self.get()
        return Bench(bench.project, bench.store, bench.settings, started=time.time())


BENCH = _Current()


def at_work() -> set[str]:
    """Runs of which a step's body is at work in this process."""
    return set(_at_work)


def step(name: str) -> Callable[[Callable[..., Awaitable[State]]], Callable[..., Awaitable[State]]]:
    """A durable step `async def body(bench, run_id, ...)`: recorded, preemptible, its failure in the run's row.

    Repeated while the store is away; ended as TimedOut when the recipe's `timeouts` say so.
    """

    def decorate(body: Callable[..., Awaitable[State]]) -> Callable[..., Awaitable[State]]:
        @functools.wraps(body)
        async def recorded(run_id: str, *rest: Any) -> State:
            bench = BENCH.fresh()
            attempt = await through_outage(runs.begin_step, bench.store, run_id, name, "step")
            _at_work.add(run_id)
            try:
                result = await _in_time(bench, run_id, name, lambda: body(bench, run_id, *rest))
            except FtError as error:
                await _note_end(bench, run_id, name, attempt, error)
                raise
            except asyncio.CancelledError:
                with suppress(StoreError):
                    await asyncio.to_thread(_end, bench, run_id, name, attempt, "cancelled")
                raise
            finally:
                _at_work.discard(run_id)
            await through_outage(_end, bench, run_id, name, attempt)
            return result

        # functools.wraps would keep the body's first parameter in the signature that DBOS reads.
        del recorded.__wrapped__
        return DBOS.step(name=name, preemptible=True)(recorded)

    return decorate


async def _in_time(bench: Bench, run_id: str, name: str, work: Callable[[], Awaitable[State]]) -> State:
    # Training is stopped with a checkpoint by who watches it; most steps can have no limit.
    if name == "train" or name not in Timeouts.model_fields:
        return await repeated(work)
    timeouts = (await through_outage(bench.recipe, run_id)).timeouts
    limit = timeouts.of(name)
    try:
        async with asyncio.timeout(limit) as scope:
            return await repeated(work)
    except TimeoutError:
        if not scope.expired():
            raise
        raise TimedOut(
            f"step '{name}' took longer than timeouts.{name} ({getattr(timeouts, name)})", place=run_id,
            fix=f"`ft resume {run_id}` tries it again; without that line in the recipe there is no limit",
        ) from None  # fmt: skip


async def _note_end(bench: Bench, run_id: str, name: str, attempt: int, error: FtError) -> None:
    if isinstance(error, StoreError):  # waited for in vain; the worker writes it down when it can
        return
    await through_outage(_end, bench, run_id, name, attempt, error.what)
    await through_outage(_fail, bench, run_id, error)


def _fail(bench: Bench, run_id: str, error: FtError) -> None:
    """A trainer that a cancel has stopped may be seen before the cancel reaches its step: that is no failure."""
    if bench.run(run_id).wish not in runs.STOPS:
        runs.finish(bench.store, run_id, "failed", error)


def _end(bench: Bench, run_id: str, name: str, attempt: int, error: str = "") -> None:
    note = {"spent": bench.spent, **({"error": error} if error else {})}
    runs.end_step(bench.store, run_id, name, attempt, note)

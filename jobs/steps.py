"""What all steps of a run share: the project's parts, and a record of each attempt with where its time went."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from dbos import DBOS

from registry import runs
from registry.adapters import promotions
from registry.errors import FtError, StoreError
from registry.project import Project
from registry.recipe import Finetune
from registry.settings import Settings
from registry.store import Store

State = dict[str, Any]
Value = TypeVar("Value")
LOST_STORES, PAUSE_SECONDS, CALM_SECONDS = 4, 0.5, 60.0
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
    """A durable step `async def body(bench, run_id, ...)`: recorded, preemptible, its failure in the run's row."""

    def decorate(body: Callable[..., Awaitable[State]]) -> Callable[..., Awaitable[State]]:
        @functools.wraps(body)
        async def recorded(run_id: str, *rest: Any) -> State:
            bench = BENCH.fresh()
            try:
                return await while_store_returns(lambda: _attempt(bench, name, body, run_id, *rest))
            except FtError as error:
                runs.finish(bench.store, run_id, "failed", error)
                raise

        # functools.wraps would keep the body's first parameter in the signature that DBOS reads.
        del recorded.__wrapped__
        return DBOS.step(name=name, preemptible=True)(recorded)

    return decorate


async def while_store_returns(attempt: Callable[[], Awaitable[Value]]) -> Value:
    """Attempt again when the database went away under it, for a restart of Postgres must not end a night's run.

    Raises StoreError when that happens five times without a minute between two.
    """
    lost = 0
    while True:
        began = time.monotonic()
        try:
            return await attempt()
        except StoreError:
            lost = 1 if time.monotonic() - began > CALM_SECONDS else lost + 1
            if lost > LOST_STORES:
                raise
            await asyncio.sleep(lost * PAUSE_SECONDS)


async def _attempt(bench: Bench, name: str, body: Callable[..., Awaitable[State]], run_id: str, *rest: Any) -> State:
    attempt = await asyncio.to_thread(runs.begin_step, bench.store, run_id, name, "step")
    _at_work.add(run_id)
    try:
        result = await body(bench, run_id, *rest)
    except FtError as error:
        runs.end_step(bench.store, run_id, name, attempt, {"error": error.what, "spent": bench.spent})
        raise
    except asyncio.CancelledError:
        runs.end_step(bench.store, run_id, name, attempt, {"error": "cancelled", "spent": bench.spent})
        raise
    finally:
        _at_work.discard(run_id)
    runs.end_step(bench.store, run_id, name, attempt, {"spent": bench.spent})
    return result

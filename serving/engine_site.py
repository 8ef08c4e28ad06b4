"""Where engines live: what all of them have in common."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from registry.base_models import BaseModel
from registry.errors import StoreError
from registry.project import Project
from registry.serve_recipe import EngineTerms
from registry.settings import Settings
from registry.store import Store
from serving.engine import Engine
from serving.published import ended
from serving.publishing import Publisher
from serving.reconciler import Reconciler, always, nothing_answers
from serving.routes import Away, Board, Routes
from serving.vllm_process import EngineConfig
from serving.wanted import wanted_models


def itself(engine: str) -> str:
    """The part of the board where an engine is without an adapter."""
    return f"{engine} itself"


@dataclass(frozen=True)
class Site:
    """Where engines live: the project's parts, the board, and who is told that an engine's state has changed.

    `unjudged`: models whose candidate may answer without a passing verdict."""

    project: Project
    store: Store
    settings: Settings
    board: Board
    changed: Callable[[], None]
    publisher: Publisher | None = None
    unjudged: frozenset[str] = frozenset()

    def reconciler(self, engine: Engine, config: EngineConfig, terms: EngineTerms) -> Reconciler:
        """For one start of an engine; it puts up the part of the board that has the engine's name."""
        return Reconciler(
            self.project, self.store, self.board, engine, config, config.name, may_unload=self.may_unload(engine),
            slots=terms.max_cpu_loras, pinned=terms.pin, unjudged=self.unjudged,
        )  # fmt: skip

    async def flip_away(self, name: str, base: BaseModel, why: Away) -> None:
        """Nothing of that engine answers from now on: every name that it should answer is away."""
        self.board.put(itself(name), Routes(engines={name: why}))
        try:
            models = await asyncio.to_thread(wanted_models, self.store, base, self.unjudged)
            away = nothing_answers(models, why)
        except StoreError:  # a dead engine's routes go all the same, and the server does not end with it
            away = ended(self.board.part(name), why)
        self.board.put(name, away)

    def may_unload(self, engine: Engine) -> Callable[[str], Awaitable[bool]]:
        """Has every other gateway let go of a version on that engine?"""
        return partial(self.publisher.may_unload, engine) if self.publisher else always

    def last_used(self, engine: Engine) -> float:
        """When a request here or at another gateway last ended there (time.monotonic)."""
        elsewhere = self.publisher.last_used(engine) if self.publisher else 0.0
        return max(self.board.last_used(engine), elsewhere)

    async def drained(self, engine: Engine) -> None:
        """Wait until nothing is under way on it, here or at another gateway, as long as the settings allow."""
        parts = self.publisher or self.board
        await parts.drained(engine, self.settings.drain_seconds)

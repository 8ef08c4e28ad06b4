"""A card as this server holds it: one lock for all engines that are on it, and who of them is up when."""

from __future__ import annotations

import asyncio
import os
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import replace
from typing import Any

from registry.cards import Card, CardLock, as_set, holder, holder_beside, list_cards, try_lock, try_lock_beside, wanted
from registry.project import Project
from registry.settings import Settings
from serving.engine_plan import CardPlan, plan_card
from serving.vllm_process import EngineConfig


class SharedCard:
    """`configs` by engine. `plan` is made before the first engine starts, and again when one needs a larger rank."""

    def __init__(self, project: Project, settings: Settings, card: Card) -> None:
        self.project, self.settings, self.card = project, settings, card
        self.configs: dict[str, EngineConfig] = {}
        self.always: set[str] = set()
        self.plan = CardPlan(0)
        self._lock: CardLock | None = None
        self._users = 0
        self._starting = asyncio.Lock()

    def add(self, config: EngineConfig, *, always: bool) -> None:
        self.configs[config.name] = config
        if always:
            self.always.add(config.name)

    async def planned(self, config: EngineConfig) -> EngineConfig:
        """The engine's config with what the planner says of it now. Raises DoesNotFit, BaseModelError."""
        self.configs[config.name] = config
        await self.make_plan()
        served = self.plan.served.get(config.name)
        return replace(config, planned=served)

    async def make_plan(self) -> None:
        if not self.card.is_cpu and not self._users:  # what others hold may have changed
            seen = [each for each in list_cards() if each.name == self.card.name]
            [self.card] = as_set(seen, self.settings.cards) or [self.card]
        configs, always = list(self.configs.values()), frozenset(self.always)
        self.plan = await asyncio.to_thread(plan_card, self.project, self.card, configs, always)

    def start_alone(self) -> AbstractAsyncContextManager[Any]:
        """On a GPU one engine after another: a vLLM that measures what is free ends if that changes meanwhile."""
        return nullcontext() if self.card.is_cpu else self._starting

    def take(self) -> CardLock | None:
        """The right to use the card, for one more engine; None while somebody else has it."""
        if self._lock is None:
            self._lock = self._try_lock()
            if self._lock is None:
                return None
        self._users += 1
        # The same lock: it is free when the last of these, and of the processes that inherited one, is closed.
        return CardLock(os.dup(self._lock.fd))

    def leave(self, lock: CardLock) -> None:
        lock.release()
        self._users -= 1
        if not self._users and self._lock is not None:
            self._lock.release()
            self._lock = None

    def holder(self) -> str:
        return (holder_beside if self.shares else holder)(self.project, self.card)

    @property
    def shares(self) -> bool:
        """Does the server stay on its card when a trainer wants it?"""
        return self.card.serve == "share"

    def training_waits(self) -> bool:
        return not self.shares and wanted(self.project, self.card, "train") and not self.evaluation_waits()

    def evaluation_waits(self) -> bool:
        return wanted(self.project, self.card, "eval")

    def _try_lock(self) -> CardLock | None:
        name = f"ft serve, pid {os.getpid()}"
        if self.shares:
            return try_lock_beside(self.project, self.card, name, min(self.plan.room, sum(self.plan.needs.values())))
        return try_lock(self.project, self.card, name)

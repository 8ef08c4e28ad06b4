"""All engines of a serve recipe: each in rounds of its own, those on demand in their turns on their cards."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

from serving.engine_site import Site
from serving.lent_engine import LentEngine
from serving.moves import watching_moves
from serving.own_engine import OwnEngine
from serving.server_record import EngineStatus
from serving.shared_card import SharedCard
from serving.to_serve import ToServe, config_of
from serving.turns import decide

TURN_SECONDS = 0.25


class AnyEngine(Protocol):
    """Ours or lent."""

    async def prepare(self) -> None: ...

    async def run(self) -> None: ...

    async def close(self) -> None: ...

    def status(self) -> EngineStatus: ...


class Fleet:
    """Made from what is to be served; `run` it, then `close` it."""

    def __init__(self, site: Site, what: ToServe) -> None:
        """Raises WrongInput for a card that is not on this host, RecipeError for a variable that is not set."""
        self.site = site
        self.cards: dict[str, SharedCard] = {}
        self.own: dict[str, OwnEngine] = {}
        for number, (name, terms) in enumerate(what.own().items()):
            config = replace(config_of(site.settings, name, terms, what.bases[name]), number=number)
            card = self.cards.setdefault(config.card.name, SharedCard(site.project, site.settings, config.card))
            card.add(config, always=terms.start == "always")
            self.own[name] = OwnEngine(site, name, terms, config, card, only=len(what.recipe.engines) == 1)
        lent = {name: LentEngine(site, name, each, what.bases[name]) for name, each in what.lent().items()}
        self.engines: dict[str, AnyEngine] = {**self.own, **lent}

    async def prepare(self) -> None:
        """Before anybody asks. Raises DoesNotFit where the engines that are always up do not fit on their card."""
        for card in self.cards.values():
            await card.make_plan()
        for each in self.engines.values():
            await each.prepare()

    async def run(self) -> None:
        """Until cancelled. Raises what the first start of the only engine raises."""
        with watching_moves(self.site.store, self.site.board):
            work = [each.run() for each in self.engines.values()]
            tasks = [asyncio.create_task(each) for each in (*work, self._turns())]
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for each in done:
                    each.result()
            finally:
                for each in tasks:
                    each.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def close(self) -> None:
        """Stop every engine; they end at the same time."""
        await asyncio.gather(*(each.close() for each in self.engines.values()))

    def statuses(self) -> dict[str, EngineStatus]:
        return {name: each.status() for name, each in self.engines.items()}

    def keys(self) -> Mapping[str, dict[str, str]]:
        """Address and key of each engine that is up, for evaluations."""
        up = {name: each.vllm.engine for name, each in self.own.items() if each.vllm}
        return {name: {"engine_url": each.url, "engine_key": each.key} for name, each in up.items()}

    async def _turns(self) -> None:
        while True:
            for card in self.cards.values():
                # Files, behind a lock: not in the loop in which requests are answered.
                self._turn(card, evaluated=await asyncio.to_thread(card.evaluation_waits))
            await asyncio.sleep(TURN_SECONDS)

    def _turn(self, card: SharedCard, *, evaluated: bool) -> None:
        """Who is always up starts and restarts by itself, so only those on demand are told."""
        engines = [each for each in self.own.values() if each.card is card]
        if not any(each.on_demand for each in engines):
            return
        found = decide([each.stand(evaluated=evaluated) for each in engines], card.plan.room, time.monotonic())
        told = {each.name: each for each in engines if each.on_demand}
        for name in found.start:
            if name in told:
                told[name].turn_on()
        for name in found.stop:
            told[name].turn_off()
        for name in found.evict:
            told[name].turn_off(whole=True)
        for name, until in found.waits.items():
            if name in told:
                self.site.board.demand.waits(name, until)

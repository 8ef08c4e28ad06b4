"""One vLLM of ours, kept in step with what is wanted of it: up or off, with its adapters, on its card or not.

Its rounds are its own, so the minutes of one engine's start are no pause in another's swaps. Whether it has to be up
the fleet says (`on`); everything else is read off its card, its process and the store.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from functools import partial

from registry.cards import CardLock
from registry.durations import seconds
from registry.errors import EngineError, FtError
from registry.serve_recipe import EngineTerms
from serving.engine import BASE
from serving.engine_site import Site, itself
from serving.reconciler import Reconciler, rank_needed
from serving.routes import Away, Route, Routes
from serving.server_record import EngineState, EngineStatus
from serving.shared_card import SharedCard
from serving.turns import Place, Stand
from serving.vllm_process import EngineConfig, VllmProcess, engine_rank, start_vllm

POLL_SECONDS = 0.5
LONGEST_BACK_OFF = 60.0
HEALTH_SECONDS, UNWELL_ROUNDS = 10.0, 3
TRAINING_RETRY_AFTER = 30
# What a sleeping vLLM keeps of its card: CUDA's context, mostly.
ASLEEP_BYTES = 1 << 30
EVALUATION_SECONDS = 10.0


class OwnEngine:
    """The state between rounds: at most one vLLM, with its part of the card's lock and its reconciler.

    `only`: there is no other engine, so an engine that cannot be started at all ends the server.
    """

    def __init__(
        self, site: Site, name: str, terms: EngineTerms, config: EngineConfig, card: SharedCard, *, only: bool
    ) -> None:
        self.site, self.name, self.terms, self.config, self.card = site, name, terms, config, card
        self.demand, self.on_demand = site.board.demand, terms.start == "demand"
        self.may_end_server = only and not self.on_demand
        self.on, self.may_sleep = not self.on_demand, terms.sleep and config.sleeps
        self.place: Place = "off" if self.on_demand else "coming"
        self.since = self.began = time.monotonic()
        self.vllm: VllmProcess | None = None
        self.lock: CardLock | None = None
        self.reconciler: Reconciler | None = None
        self.failures, self.unwell, self.not_before = 0, 0, 0.0
        self.state: EngineState = "starting"
        self.reason = ""
        self.starts = self.failed_starts = 0
        self._watching: asyncio.Task[None] | None = None

    async def prepare(self) -> None:
        if self.on_demand:
            self.state = "off"
        await self._flip_away(self._off() if self.on_demand else Away("the engine is starting"))

    async def run(self) -> None:
        """One round after another, until cancelled; then `close` it. Raises FtError where it `may_end_server`."""
        while True:
            seen = self.site.board.pokes
            try:
                await self._round()
            except FtError as error:
                if self.vllm is None:
                    self._back_off(error)
                else:
                    await self._look_after(self.vllm, error)
            await self.site.board.poked(seen, POLL_SECONDS)

    async def close(self) -> None:
        await self._stop_engine()

    def stand(self, *, evaluated: bool) -> Stand:
        """How it stands on its card, for `turns.decide`. `evaluated`: an evaluation wants the card."""
        upstream = self.vllm.engine if self.vllm else None
        board, now = self.site.board, time.monotonic()
        # An evaluation asks the engine past the gateway: as long as it does, another's turn has to wait.
        residence = max(seconds(self.terms.residence), now - self.since + EVALUATION_SECONDS if evaluated else 0.0)
        return Stand(
            name=self.name,
            place=self.place,
            needs=self.card.plan.needs.get(self.name, 0),
            since=self.since,
            used=self.site.last_used(upstream) if upstream else 0.0,
            wanted=None if now < self.not_before else self.demand.wanted_since(self.name),
            busy=upstream is not None and (board.busy(upstream) or evaluated),
            always=not self.on_demand,
            residence=residence,
            idle=seconds(self.terms.idle),
            rests=ASLEEP_BYTES if self.may_sleep else 0,
        )

    def status(self) -> EngineStatus:
        here, vllm, plan = self.reconciler, self.vllm, self.card.plan
        public = self.site.board.part(self.name).public.items()
        planned = self.config.planned
        return EngineStatus(
            name=self.name,
            state=self.state,
            reason=self.reason,
            base=self.config.base.as_dict(),
            serve=self.config.serve.model_dump(),
            card=self.config.card.name,
            max_rank=self.config.max_rank,
            precision="bitsandbytes" if self.config.in_4_bits else "bf16",
            start=self.terms.start,
            given_up=planned.given_up if planned else [],
            need=plan.needs.get(self.name, 0),
            room=plan.room,
            url=vllm.engine.url if vllm else "",
            pid=vllm.pid if vllm else None,
            starts=self.starts,
            failed_starts=self.failed_starts,
            start_seconds=self.demand.start_seconds.get(self.name),
            progress=self.demand.progress(self.name) if self.on_demand else "",
            routes={name: route.adapter for name, route in public if "@" not in name},
            loaded=sorted(here.loaded) if here else [],
            refused=here.refused if here else {},
            swaps=here.swaps if here else [],
        )

    def turn_on(self) -> None:
        """By the fleet: its turn has come."""
        self.on, self.may_sleep = True, self.terms.sleep and self.config.sleeps
        self._put("coming")
        self.demand.starts(self.name)

    def turn_off(self, *, whole: bool = False) -> None:
        """By the fleet: at the next round. `whole`: not to sleep, because even its rest is in the way."""
        self.on = False
        if whole:
            self.may_sleep = False
        else:
            self._put("going")

    async def _round(self) -> None:
        rank = engine_rank(await asyncio.to_thread(rank_needed, self.site.store, self.config.base))
        if await asyncio.to_thread(self.card.training_waits):
            await self._give_way()
        elif not self.on:
            await self._go()
        elif self.vllm is None:
            await self._start(max(rank, self.config.max_rank))
        elif not self.vllm.running:
            await self._lose_engine()
        elif self.state == "asleep":
            await self._wake(self.vllm)
        elif rank > self.config.max_rank:
            await self._drain(Away("its engine restarts for a larger adapter"))
            await self._stop_engine()
            self._put("coming")
        else:
            await self._reconcile(self.vllm)

    async def _reconcile(self, vllm: VllmProcess) -> None:
        assert self.reconciler is not None
        await self.reconciler.step()
        self.failures = self.unwell = 0
        if self.place != "up":
            self.site.board.put(itself(self.name), Routes(engines={self.name: Route(BASE, vllm.engine)}))
            self._put("up")
            self.demand.is_up(self.name, time.monotonic() - self.began)
        self._say("serving")

    async def _look_after(self, vllm: VllmProcess, error: FtError) -> None:
        """A round that failed is repeated; an engine that lives but no longer answers is given up."""
        self._say(self.state, error.what)
        self.unwell = 0 if await vllm.engine.healthy(HEALTH_SECONDS) else self.unwell + 1
        if self.unwell >= UNWELL_ROUNDS:
            await self._lose_engine()

    async def _start(self, max_rank: int) -> None:
        if time.monotonic() < self.not_before:
            return
        self._put("coming")
        self.config = await self.card.planned(replace(self.config, max_rank=max_rank))
        self.lock = self.card.take()
        if self.lock is None:
            self._say("waiting for the card", f"held by {self.card.holder()}")
            if self.on_demand:
                # Hours, if it is a training: no request is held for that.
                await self._flip_away(replace(self._off("waits for its card"), retry_after=30, hold=False))
            return
        self._say("engine restarting" if self.starts and not self.on_demand else "starting")
        self.began = time.monotonic()
        self.demand.starts(self.name)
        if self.on_demand:
            await self._flip_away(self._off("is starting"))
        site = self.site
        try:
            async with self.card.start_alone():
                self.vllm = await start_vllm(site.project, site.settings, self.config, self.lock)
        except BaseException as error:
            self.failed_starts += isinstance(error, FtError)
            self._release()
            raise
        self._begin(self.vllm)
        self.starts += 1
        self._watching = asyncio.create_task(self._watch(self.vllm))
        site.changed()

    def _begin(self, vllm: VllmProcess) -> None:
        """Nothing is known to be loaded: a new reconciler probes every version before it answers."""
        site = self.site
        self.reconciler = site.reconciler(vllm.engine, self.config, self.terms)

    async def _watch(self, vllm: VllmProcess) -> None:
        """Take the routes away the moment the engine is gone, not at the next round."""
        await vllm.ended()
        if self.vllm is vllm and self.state != "asleep":
            await self._flip_away(Away("its engine is restarting"))

    async def _lose_engine(self) -> None:
        assert self.vllm is not None
        lost = EngineError(f"vLLM ended:\n{self.vllm.last_words()}", place=str(self.vllm.log))
        await self._flip_away(Away("its engine is restarting"))
        await self._stop_engine()
        if self.on:
            self._put("coming")
        self._back_off(lost)

    def _back_off(self, error: FtError) -> None:
        if self.may_end_server and not self.starts:
            raise error
        self.failures += 1
        delay = min(LONGEST_BACK_OFF, 2.0 ** (self.failures - 1) - 1)
        self.not_before = time.monotonic() + delay
        self._say("engine restarting" if self.starts else "starting", error.what)
        if self.on_demand and delay:
            # It must not keep the card from others that wait; who wants it asks again.
            self.on = False
            self._put("going")

    async def _give_way(self) -> None:
        away = Away("its card is given to training", retry_after=TRAINING_RETRY_AFTER, hold=False)
        if self.vllm is not None:
            self._say("giving the card to training")
            await self._drain(away)
            await self._stop_engine()
        if self.state != "card given to training":
            self.on = not self.on_demand
            self._put("coming" if self.on else "off")
            self.demand.is_off(self.name)
            await self._flip_away(away)
            self._say("card given to training")

    async def _go(self) -> None:
        """Nobody wants it, or it is another's turn: what is under way ends first."""
        if self.vllm is not None and self.state != "asleep":
            self._say("stopping")
            await self._drain(self._off())
            if self.may_sleep and self.vllm.running:
                await self.vllm.engine.sleep()
                self._rest("asleep")
                return
        if self.vllm is not None and (not self.may_sleep or not self.vllm.running):
            await self._stop_engine()
        if self.vllm is None and (self.state != "off" or self.place != "off"):
            await self._flip_away(self._off())
            self._rest("off")

    def _rest(self, place: EngineState) -> None:
        self._put("asleep" if place == "asleep" else "off")
        self.demand.is_off(self.name, place)
        self._say(place, self.reason if time.monotonic() < self.not_before else "")

    async def _wake(self, vllm: VllmProcess) -> None:
        self._say("starting", "it wakes")
        self.began = time.monotonic()
        try:
            await vllm.engine.wake()
        except EngineError:
            await self._lose_engine()
            return
        self._begin(vllm)

    async def _drain(self, away: Away) -> None:
        """No new requests; those under way may end within the time for it."""
        await self._flip_away(away)
        if self.vllm is not None:
            await self.site.drained(self.vllm.engine)

    async def _stop_engine(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None
        self.reconciler = None
        if self.vllm is not None:
            await self.vllm.stop()
        self.vllm = None  # only now: who is cancelled above has to be able to stop it again
        self._release()
        self.site.changed()

    def _release(self) -> None:
        if self.lock is not None:
            self.card.leave(self.lock)
            self.lock = None

    async def _flip_away(self, why: Away) -> None:
        await self.site.flip_away(self.name, self.config.base, why)

    def _off(self, how: str = "starts when it is wanted") -> Away:
        demand, name = self.demand, self.name
        return Away(f"engine '{name}' {how}", seconds=demand.hold(name), want=partial(demand.want, name), engine=name)

    def _put(self, place: Place) -> None:
        if place != self.place:
            self.place, self.since = place, time.monotonic()

    def _say(self, state: EngineState, reason: str = "") -> None:
        if (state, reason) != (self.state, self.reason):
            print(f"{time.strftime('%H:%M:%S')} {self.name}: {state}{': ' if reason else ''}{reason}", flush=True)
            self.state, self.reason = state, reason
            self.site.changed()

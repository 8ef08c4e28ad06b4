"""Makes an engine and the routes agree with the aliases: load what is wanted, decide, apply, and again.

Where there are more versions than the engine has room for, the least recently used ones make room (serving/slots.py),
and one that is not loaded comes up when somebody asks for it. One reconciler belongs to one start of one engine. What a
version was refused for is remembered that long, so a failed probe is not repeated twice a second.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from registry import rollouts
from registry.adapters import Promotion, Version
from registry.alias_requests import note_refusal_within
from registry.base_models import base_path
from registry.cards import wanted
from registry.errors import AdmissionError
from registry.events import append, append_within, new_event
from registry.project import Project
from registry.rollouts import Rollout
from registry.store import Store
from serving.engine import BASE, Engine
from serving.rollout_keeper import RolloutKeeper
from serving.routes import Away, Board, Route, Routes, Split
from serving.slots import Need, Slots, Use, by_need, share_out
from serving.swap import Landed, ProbeFailed, bring_up
from serving.vllm_process import EngineConfig, lora_modules
from serving.wanted import Wanted, last_move, rank_needed, wanted_models

__all__ = ["Reconciler", "decide", "need_of", "nothing_answers", "rank_needed", "wanted_models"]

KEPT_SWAPS = 20
SLOTS = 16
# Who waited for a version has long been told to come again.
ASKED_SECONDS = 60.0
# So long a request waits for a version that is being loaded: seven others may come before it, a second each.
LOADING_PATIENCE = 30.0


@dataclass(frozen=True)
class Decision:
    """Wanted against actual. `live` is public model name -> `model@N`; `named`: versions that anybody may name.

    `canaries`: rollouts of which both versions can answer.
    """

    live: Mapping[str, str]
    named: frozenset[str]
    away: Mapping[str, Away]
    closed: Mapping[str, str]
    unload: tuple[str, ...]
    canaries: Mapping[str, Rollout] = field(default_factory=dict)


async def always(_: str) -> bool:
    return True


class Reconciler:
    """`step` is one round; `loaded`, `refused` and `swaps` are for whoever asks for the state."""

    def __init__(  # noqa: PLR0913
        self,
        project: Project,
        store: Store,
        board: Board,
        engine: Engine,
        config: EngineConfig,
        part: str,
        *,
        may_unload: Callable[[str], Awaitable[bool]] = always,
        slots: int = SLOTS,
        pinned: Collection[str] = (),
        unjudged: Collection[str] = (),
    ) -> None:
        """`part`: under which name the engine's routes are put up on the board. `may_unload`: has every other gateway
        let go of that version? `slots`: so many adapters at once. `pinned`: models whose champion never makes room.
        `unjudged`: models of which, without a champion, the candidate answers."""
        self.project, self.store, self.board, self.engine, self.config = project, store, board, engine, config
        self.part, self.may_unload = part, may_unload
        self.slots, self.pinned, self.unjudged = slots, frozenset(pinned), frozenset(unjudged)
        self.modules = lora_modules(base_path(project, config.base))
        self.landed: dict[str, Landed] = {}
        # Still loaded, and on no route any more: they go when their last request has ended.
        self.leaving: dict[str, Landed] = {}
        self.refused: dict[str, str] = {}
        self._refused_at: dict[str, str] = {}
        self.swaps: list[dict[str, Any]] = []
        self.told: set[int] = set()
        self.loaded: dict[str, str] = {}
        self.rollouts = RolloutKeeper(store, board)

    async def step(self) -> None:
        """Bring up what is missing, flip what has landed, drop what nobody needs. Raises EngineError."""
        models = await asyncio.to_thread(wanted_models, self.store, self.config.base, self.unjudged)
        self.loaded = await self.engine.models()
        self.landed = {name: each for name, each in self.landed.items() if name in self.loaded}
        self.leaving = {name: each for name, each in self.leaving.items() if name in self.loaded}
        self._forget_refusals(models)
        self._forget_who_asked()
        guests = await asyncio.to_thread(wanted, self.project, self.config.card, "eval")
        for _ in range(self.slots):  # not for as long as there is something to do: the round must end
            slots = self._shared_out(models, guests)
            if not slots.load or not await self._made_room(models, slots):
                break
            await self._bring_up(next(v for each in models for v in each.versions if v.name == slots.load[0]))
            await self._settle(models)
        decision = await self._settle(models)
        await self._unload([*self.leaving, *(() if guests else decision.unload)])
        await self._look_after_rollouts(models, decision)

    def _shared_out(self, models: Sequence[Wanted], guests: bool) -> Slots:
        """Who has a place. `guests`: an evaluation loads versions of its own into this engine, and asks them itself."""
        live = self._live()
        needs = [need_of(each, self.refused, live.get(each.model, "")) for each in models if each.versions]
        order = by_need(needs, Use(self.board.used, self.board.asked, self.pinned))
        pinned = {each.champion for each in needs if each.model in self.pinned}
        busy = {name for name in self.loaded if self.board.in_flight[Route(name, self.engine)]}
        fixed = busy | pinned | ({*self.loaded} - {*order} if guests else set())
        slots = share_out(order, self.loaded, fixed, self.slots)
        for name in slots.keep & self.leaving.keys():
            self.landed[name] = self.leaving.pop(name)
        # One that an evaluation loaded has a place, and has not been probed.
        known = {version.name for each in models for version in each.versions}
        load = tuple(name for name in order if name in slots.keep & known and name not in self.landed)
        return replace(slots, load=load)

    async def _made_room(self, models: Sequence[Wanted], slots: Slots) -> bool:
        """Let the first of `spare` go until there is room for one more."""
        if slots.load[0] in self.loaded:
            return True
        for name in slots.spare:
            if len(self.loaded) < self.slots:
                break
            if name in self.landed:
                self.leaving[name] = self.landed.pop(name)
                await self._settle(models)
            await self._unload([name])
        return len(self.loaded) < self.slots

    def _forget_refusals(self, models: Sequence[Wanted]) -> None:
        """Who promotes a refused version again wants it tried again."""
        for each in models:
            for name in (each.champion, each.canary):
                occasion = each.occasion(name)
                if name in self.refused and occasion and self._refused_at[name] != occasion:
                    del self.refused[name]

    def _forget_who_asked(self) -> None:
        now = time.monotonic()
        for name, since in list(self.board.asked.items()):
            if now - since > ASKED_SECONDS:
                del self.board.asked[name]

    async def _bring_up(self, version: Version) -> None:
        folder = self.project.home / version.folder
        try:
            self.landed[version.name] = await bring_up(self.engine, version, folder, self.config.max_rank, self.modules)
            self.board.used[version.name] = time.monotonic()
        except AdmissionError as error:
            self.refused[version.name] = error.what
            self._refused_at[version.name] = await asyncio.to_thread(self._note_refusal, version, error)
        self.loaded = await self.engine.models()

    async def _settle(self, models: Sequence[Wanted]) -> Decision:
        decision = decide(models, self.landed, self.refused, self._live(), self.loaded)
        self._apply(decision)
        await self._tell(models)
        return decision

    def _apply(self, decision: Decision) -> None:
        before = self._live()
        for name in (*decision.live, *decision.named):
            self.board.asked.pop(name, None)
        routes = self._routes(decision)
        if routes == self.board.part(self.part):
            return
        began = time.perf_counter()
        self.board.put(self.part, routes)
        flip = time.perf_counter() - began
        for model, name in decision.live.items():
            if before.get(model) != name:
                self._record(model, name, before.get(model), flip)

    def _routes(self, decision: Decision) -> Routes:
        named = {name: Route(name, self.engine) for name in decision.named}
        loaded = [name for name in self.loaded if name not in self.leaving]
        internal = {name: Route(name, self.engine) for name in (*loaded, BASE)}
        public = {model: Route(name, self.engine) for model, name in decision.live.items()}
        away = {name: replace(each, want=partial(self.board.want, name)) for name, each in decision.away.items()}
        splits = {
            model: Split(
                public[model], Route(each.name, self.engine), each.percent, f"{model}-{each.id}", each.terms.by
            )
            for model, each in decision.canaries.items()
        }
        both = {**named, **public}
        return Routes(public=both, internal=internal, away=away, closed=decision.closed, splits=splits)

    def _live(self) -> dict[str, str]:
        """Public model name -> version, as this engine answers now."""
        public = self.board.part(self.part).public.items()
        return {name: each.adapter for name, each in public if "@" not in name and each.engine is self.engine}

    async def _unload(self, names: Sequence[str]) -> None:
        """Of these, what nobody's request is on. They are on no route any more."""
        for name in names:
            # Asked last: no await may lie between the look at the requests and the order to the engine.
            if await self.may_unload(name) and not self.board.in_flight[Route(name, self.engine)]:
                await self.engine.unload(name)
                self.landed.pop(name, None)
                self.leaving.pop(name, None)
                self.loaded.pop(name, None)

    async def _look_after_rollouts(self, models: Sequence[Wanted], decision: Decision) -> None:
        refused = {
            f"it was refused: {self.refused[each.canary]}": each.rollout
            for each in models
            if each.rollout and each.canary in self.refused
        }
        await self.rollouts.look(decision.canaries, refused)

    def _record(self, model: str, name: str, before: str | None, flip: float) -> None:
        landed = self.landed[name]
        # The way of a version that was loaded already (a rollback's) has been told with its first flip.
        again = any(each["version"] == name for each in self.swaps)
        swap = {
            "version": name,
            "at": time.time(),
            "route": model,
            "from": before,
            "seconds": {**({} if again else landed.seconds), "flip": round(flip, 7)},
            "parity": {"outcome": landed.parity.outcome, "reason": landed.parity.reason, **landed.parity.numbers},
        }
        self.swaps = [*self.swaps, swap][-KEPT_SWAPS:]

    async def _tell(self, models: Sequence[Wanted]) -> None:
        """Append `adapter.served` once for each move of `champion`, when its version answers."""
        live = self._live()
        for each in models:
            moved = each.moved
            if moved and moved.id not in self.told and live.get(each.model) == f"{each.model}@{moved.version}":
                await asyncio.to_thread(self._append_served, moved)
                self.told.add(moved.id)

    def _append_served(self, moved: Promotion) -> None:
        name = f"{moved.model}@{moved.version}"
        swap = next((each for each in reversed(self.swaps) if each["version"] == name), {"at": time.time()})
        data = {**swap, "since_promotion": round(max(0.0, swap["at"] - moved.created), 3)}
        append(self.store, new_event("ft/serving", "adapter.served", name, data, key=f"served-{moved.id}",
                                     cause=f"ft/adapters {moved.id}"))  # fmt: skip

    def _note_refusal(self, version: Version, error: AdmissionError) -> str:
        """Append the event, and have MLflow told; the occasion that it answers (see `Wanted.occasion`)."""
        moved = last_move(self.store, version.model, version.version)
        numbers = error.parity.numbers if isinstance(error, ProbeFailed) else {}
        data = {"reason": error.what, "place": error.place, "parity": numbers}
        occasion, cause = str(moved.id) if moved else "0", f"ft/adapters {moved.id}" if moved else None
        for rollout in rollouts.running(self.store, version.model):
            if rollout.version == version.version:
                occasion, cause = f"rollout-{rollout.id}", f"{rollouts.SOURCE} {rollout.id}-started"
        key = f"refused-{version.name}-{occasion}"
        event = new_event("ft/serving", "adapter.refused", version.name, data, key=key, cause=cause)
        with self.store.writing() as connection:
            if append_within(connection, event):
                note_refusal_within(connection, version.model, version.version, error.what)
        return occasion


def need_of(each: Wanted, refused: Collection[str], live: str) -> Need:
    """Pure. What a model wants held; `live` is the version that answers for it now. Nothing refused is held."""
    champion, canary, previous = (
        "" if name in refused else name for name in (each.champion, each.canary, each.previous)
    )
    # Behind a refused champion the version before it answers.
    answering = live if live != each.champion else ""
    answering = answering or (previous if each.champion in refused else "")
    return Need(each.model, champion, answering, canary, previous)


def decide(
    models: Sequence[Wanted],
    landed: Mapping[str, Landed],
    refused: Mapping[str, str],
    live: Mapping[str, str],
    loaded: Mapping[str, str],
) -> Decision:
    """Pure. A model's route leads to its champion once that has landed; until then, to what answered before."""
    routes: dict[str, str] = {}
    away: dict[str, Away] = {}
    for each in models:
        names = [version.name for version in each.versions]
        # Behind a refused champion the version before it answers; one that is still coming up is waited for.
        behind = [each.previous] if names and names[0] in refused else []
        candidates = [names[0], live.get(each.model, ""), *behind] if names else []
        found = next((name for name in candidates if name in landed), None)
        if found:
            routes[each.model] = found
        elif names:
            away[each.model] = _away(names[0], refused)
        away |= {name: _away(name, refused) for name in names if name not in landed}
    keep = {*routes.values(), *(version.name for each in models for version in each.versions)}
    closed = {each.model: each.closed for each in models if each.closed}
    canaries = {
        each.model: each.rollout
        for each in models
        if each.rollout and each.canary in landed and routes.get(each.model) == each.champion == each.rollout.stable
    }
    return Decision(routes, frozenset(keep & set(landed)), away, closed, tuple(sorted(set(loaded) - keep)), canaries)


def nothing_answers(models: Sequence[Wanted], why: Away) -> Routes:
    """Pure. The routes while there is no engine: every name that should lead somewhere is away."""
    names = {name for each in models if each.versions for name in (each.model, *(v.name for v in each.versions))}
    return Routes(away=dict.fromkeys(names, why), closed={each.model: each.closed for each in models if each.closed})


def _away(champion: str, refused: Mapping[str, str]) -> Away:
    if champion in refused:
        return Away(f"{champion} was refused: {refused[champion]}", retry_after=60, hold=False)
    return Away(f"{champion} is being loaded", patience=LOADING_PATIENCE)

"""Makes an engine and the routes agree with the aliases: load what is wanted, decide, apply, and again.

One reconciler belongs to one start of one engine. What a version was refused for is remembered that long, so a
failed probe is not repeated twice a second.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from registry import adapters
from registry.adapters import Promotion, Version
from registry.base_models import BaseModel, base_path
from registry.cards import wanted
from registry.errors import AdmissionError
from registry.events import append, new_event
from registry.project import Project
from registry.store import Store
from serving.engine import BASE, Engine
from serving.routes import Away, Board, Route, Routes
from serving.swap import Landed, ProbeFailed, bring_up
from serving.vllm_process import EngineConfig, lora_modules

KEPT_SWAPS = 20


@dataclass(frozen=True)
class Wanted:
    """What the store wants of one model: the versions to hold loaded, the champion first.

    `moved` is the last move of its champion; `closed` says why this server does not answer for it at all.
    """

    model: str
    versions: tuple[Version, ...]
    moved: Promotion | None = None
    closed: str = ""


@dataclass(frozen=True)
class Decision:
    """Wanted against actual. `live` is public model name -> `model@N`; `named`: versions that anybody may name."""

    live: Mapping[str, str]
    named: frozenset[str]
    away: Mapping[str, Away]
    closed: Mapping[str, str]
    unload: tuple[str, ...]


class Reconciler:
    """`step` is one round; `loaded`, `refused` and `swaps` are for whoever asks for the state."""

    def __init__(
        self, project: Project, store: Store, board: Board, engine: Engine, config: EngineConfig, part: str
    ) -> None:
        """`part`: under which name the engine's routes are put up on the board."""
        self.project, self.store, self.board, self.engine, self.config = project, store, board, engine, config
        self.part = part
        self.modules = lora_modules(base_path(project, config.base))
        self.landed: dict[str, Landed] = {}
        self.refused: dict[str, str] = {}
        self._refused_at: dict[str, int] = {}
        self.swaps: list[dict[str, Any]] = []
        self.told: set[int] = set()
        self.loaded: dict[str, str] = {}

    async def step(self) -> None:
        """Bring up what is missing, flip what has landed, drop what nobody needs. Raises EngineError."""
        models = await asyncio.to_thread(wanted_models, self.store, self.config.base)
        self.loaded = await self.engine.models()
        self.landed = {name: each for name, each in self.landed.items() if name in self.loaded}
        self._forget_refusals(models)
        for version in to_bring_up(models, self.landed, self.refused):
            await self._bring_up(version)
            await self._settle(models)
        decision = await self._settle(models)
        await self._unload(decision.unload)

    def _forget_refusals(self, models: list[Wanted]) -> None:
        """Who promotes a refused version again wants it tried again."""
        for each in models:
            name = f"{each.model}@{each.moved.version}" if each.moved else ""
            if each.moved and name in self.refused and self._refused_at[name] != each.moved.id:
                del self.refused[name]

    async def _bring_up(self, version: Version) -> None:
        folder = self.project.home / version.folder
        try:
            self.landed[version.name] = await bring_up(self.engine, version, folder, self.config.max_rank, self.modules)
        except AdmissionError as error:
            self.refused[version.name] = error.what
            self._refused_at[version.name] = await asyncio.to_thread(self._note_refusal, version, error)
        self.loaded = await self.engine.models()

    async def _settle(self, models: list[Wanted]) -> Decision:
        decision = decide(models, self.landed, self.refused, self._live(), self.loaded)
        self._apply(decision)
        await self._tell(models)
        return decision

    def _apply(self, decision: Decision) -> None:
        before = self._live()
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
        internal = {**{name: Route(name, self.engine) for name in self.loaded}, BASE: Route(BASE, self.engine)}
        public = {model: Route(name, self.engine) for model, name in decision.live.items()}
        return Routes(public={**named, **public}, internal=internal, away=decision.away, closed=decision.closed)

    def _live(self) -> dict[str, str]:
        """Public model name -> version, as this engine answers now."""
        public = self.board.part(self.part).public.items()
        return {name: each.adapter for name, each in public if "@" not in name and each.engine is self.engine}

    async def _unload(self, names: tuple[str, ...]) -> None:
        # An evaluation loads versions of its own into this engine, and asks them past the gateway.
        if names and not await asyncio.to_thread(wanted, self.project, self.config.card, "eval"):
            for name in names:
                if not self.board.in_flight[Route(name, self.engine)]:
                    await self.engine.unload(name)
                    self.landed.pop(name, None)

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

    async def _tell(self, models: list[Wanted]) -> None:
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

    def _note_refusal(self, version: Version, error: AdmissionError) -> int:
        """Append the event; the id of the move that it answers."""
        moved = _last_move(self.store, version.model, version.version)
        numbers = error.parity.numbers if isinstance(error, ProbeFailed) else {}
        data = {"reason": error.what, "place": error.place, "parity": numbers}
        move = moved.id if moved else 0
        key = f"refused-{version.name}-{move}"
        cause = f"ft/adapters {move}" if move else None
        append(self.store, new_event("ft/serving", "adapter.refused", version.name, data, key=key, cause=cause))
        return move


def wanted_models(store: Store, base: BaseModel) -> list[Wanted]:
    """Every model that has a version, and what of it belongs on an engine for `base`."""
    models = store.read("SELECT DISTINCT model FROM versions ORDER BY model")
    return [_wanted(store, each["model"], base) for each in models]


def to_bring_up(models: list[Wanted], landed: Mapping[str, Landed], refused: Mapping[str, str]) -> list[Version]:
    """Pure. Champions of all models before any previous version."""
    missing = [
        (place, version)
        for each in models
        for place, version in enumerate(each.versions)
        if version.name not in landed and version.name not in refused
    ]
    return [version for _, version in sorted(missing, key=lambda pair: pair[0])]


def decide(
    models: list[Wanted],
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
        candidates = [names[0], live.get(each.model, ""), *(names if names[0] in refused else [])] if names else []
        found = next((name for name in candidates if name in landed), None)
        if found:
            routes[each.model] = found
        elif names:
            away[each.model] = _away(names[0], refused)
        away |= {name: _away(name, refused) for name in names if name not in landed}
    keep = {*routes.values(), *(version.name for each in models for version in each.versions)}
    closed = {each.model: each.closed for each in models if each.closed}
    return Decision(routes, frozenset(keep & set(landed)), away, closed, tuple(sorted(set(loaded) - keep)))


def nothing_answers(models: list[Wanted], why: Away) -> Routes:
    """Pure. The routes while there is no engine: every name that should lead somewhere is away."""
    names = {name for each in models if each.versions for name in (each.model, *(v.name for v in each.versions))}
    return Routes(away=dict.fromkeys(names, why), closed={each.model: each.closed for each in models if each.closed})


def rank_needed(store: Store, base: BaseModel) -> int:
    """The largest rank among the versions of `base` that an alias names; 0 without any."""
    return max((int(each.body["rank"]) for each in _aliased(store) if _is_on(each, base)), default=0)


def _wanted(store: Store, model: str, base: BaseModel) -> Wanted:
    aliases = adapters.aliases(store, model)
    if "champion" not in aliases:
        return Wanted(model, (), closed="it has no champion yet")
    named = [adapters.get_version(store, model, aliases[each]) for each in ("champion", "previous") if each in aliases]
    if not _is_on(named[0], base):
        return Wanted(model, (), closed=f"its champion is on another base model ({named[0].body['base']['source']})")
    return Wanted(model, tuple(each for each in named if _is_on(each, base)), _last_move(store, model))


def _aliased(store: Store) -> list[Version]:
    found = {(each["model"], each["version"]) for each in store.read("SELECT model, version FROM aliases")}
    return [adapters.get_version(store, model, version) for model, version in sorted(found)]


def _is_on(version: Version, base: BaseModel) -> bool:
    return bool(version.body["base"]["digest"] == base.digest)


def _away(champion: str, refused: Mapping[str, str]) -> Away:
    if champion in refused:
        return Away(f"{champion} was refused: {refused[champion]}", retry_after=60, hold=False)
    return Away(f"{champion} is being loaded")


def _last_move(store: Store, model: str, to: int | None = None) -> Promotion | None:
    """The last move of the model's champion (to that version); events are deduplicated by it."""
    row = store.first(
        "SELECT * FROM promotions WHERE model = ? AND ? IN (-1, version) ORDER BY id DESC LIMIT 1",
        (model, -1 if to is None else to),
    )
    return Promotion(**row) if row else None

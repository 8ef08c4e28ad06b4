"""What the store wants of an engine: of each model the champion, `previous`, and the version of a rollout."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from registry import adapters, rollouts
from registry.adapters import Promotion, Version
from registry.base_models import BaseModel
from registry.rollouts import Rollout
from registry.store import Store


@dataclass(frozen=True)
class Wanted:
    """What the store wants of one model: the versions to hold loaded, the champion first.

    `moved` is the last move of its champion, `rollout` one that is under way; `closed` says why this server does not
    answer for it at all.
    """

    model: str
    versions: tuple[Version, ...]
    moved: Promotion | None = None
    closed: str = ""
    rollout: Rollout | None = None

    @property
    def champion(self) -> str:
        return self.versions[0].name if self.versions else ""

    @property
    def canary(self) -> str:
        return self.rollout.name if self.rollout else ""

    @property
    def previous(self) -> str:
        others = (each.name for each in self.versions if each.name not in (self.champion, self.canary))
        return next(others, "")

    def occasion(self, name: str) -> str:
        """What a version of it was last wanted for; another one is a reason to try again what was refused."""
        if name == self.canary and self.rollout:
            return f"rollout-{self.rollout.id}"
        return str(self.moved.id) if self.moved and name == f"{self.model}@{self.moved.version}" else ""


def wanted_models(store: Store, base: BaseModel, unjudged: Collection[str] = ()) -> list[Wanted]:
    """Every model that has a version, and what of it belongs on an engine for `base`. See Reconciler for `unjudged`."""
    models = store.read("SELECT DISTINCT model FROM versions ORDER BY model")
    on_the_way = {each.model: each for each in rollouts.running(store)}
    return [_wanted(store, each["model"], base, unjudged, on_the_way.get(each["model"])) for each in models]


def rank_needed(store: Store, base: BaseModel) -> int:
    """The largest rank among the versions of `base` that an alias or a rollout names; 0 without any."""
    return max((int(each.body["rank"]) for each in _aliased(store) if _is_on(each, base)), default=0)


def last_move(store: Store, model: str, to: int | None = None) -> Promotion | None:
    """The last move of the model's champion (to that version); events are deduplicated by it."""
    row = store.first(
        "SELECT * FROM promotions WHERE model = ? AND ? IN (-1, version) ORDER BY id DESC LIMIT 1",
        (model, -1 if to is None else to),
    )
    return Promotion(**row) if row else None


def _wanted(store: Store, model: str, base: BaseModel, unjudged: Collection[str], rollout: Rollout | None) -> Wanted:
    aliases = adapters.aliases(store, model)
    if "champion" not in aliases:
        candidate = adapters.get_version(store, model, aliases["candidate"]) if "candidate" in aliases else None
        if model in unjudged and candidate and _is_on(candidate, base):
            return Wanted(model, (candidate,))
        return Wanted(model, (), closed="it has no champion yet")
    named = [adapters.get_version(store, model, aliases[each]) for each in ("champion", "previous") if each in aliases]
    if not _is_on(named[0], base):
        return Wanted(model, (), closed=f"its champion is on another base model ({named[0].body['base']['source']})")
    held = [each for each in named if _is_on(each, base)]
    if rollout and rollout.version not in [each.version for each in held]:
        held.append(adapters.get_version(store, model, rollout.version))
    return Wanted(model, tuple(held), last_move(store, model), rollout=rollout)


def _aliased(store: Store) -> list[Version]:
    named = "SELECT model, version FROM aliases UNION SELECT model, version FROM rollouts WHERE state = 'running'"
    found = {(each["model"], each["version"]) for each in store.read(named)}
    return [adapters.get_version(store, model, version) for model, version in sorted(found)]


def _is_on(version: Version, base: BaseModel) -> bool:
    return bool(version.body["base"]["digest"] == base.digest)

"""What the server would do next: the aliases and rollouts against what its engine has. Pure but for `load_plan`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from registry.api_keys import ApiKey
from registry.base_models import BaseModel
from registry.serve_recipe import ANY_NAME, ServeRecipe
from registry.store import Store
from serving.reconciler import need_of
from serving.server_record import EngineStatus
from serving.slots import Use, by_need, share_out
from serving.wanted import Wanted, wanted_models


@dataclass(frozen=True)
class Line:
    """One model: the version that its name should lead to, where it leads, and what is to be done about it."""

    model: str
    wanted: str
    answers: str
    loaded: tuple[str, ...]
    todo: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ServePlan:
    """`unload`: what is loaded and nobody wants. `in_step`: there is nothing to do."""

    lines: tuple[Line, ...]
    unload: tuple[str, ...]
    slots: int

    @property
    def in_step(self) -> bool:
        return not self.unload and not any(each.todo for each in self.lines)

    def as_dict(self) -> dict[str, Any]:
        return {"in_step": self.in_step, **asdict(self)}


def load_plan(
    store: Store, status: EngineStatus | None, base: BaseModel, slots: int,
    pinned: Collection[str] = (), unjudged: Collection[str] = (),
) -> ServePlan:  # fmt: skip
    """Of an engine of the server that is up, or of one that would be started for `base`. See `Reconciler` for the
    last three."""
    models = wanted_models(store, base, unjudged)
    if status is None:
        return plan(models, {}, (), {}, slots, pinned)
    return plan(models, status.routes, status.loaded, status.refused, slots, pinned)


def plan(
    models: Sequence[Wanted],
    routes: Mapping[str, str],
    loaded: Collection[str],
    refused: Mapping[str, str],
    slots: int,
    pinned: Collection[str] = (),
) -> ServePlan:
    """`routes`: public name -> version; `slots`: how many adapters the engine holds."""
    needs = [need_of(each, refused, routes.get(each.model, "")) for each in models if each.versions]
    order = by_need(needs, Use(used=dict.fromkeys(loaded, 1.0), pinned=pinned))
    room = share_out(order, loaded, (), slots)
    lines = tuple(_line(each, routes, set(loaded), refused, room.keep) for each in models)
    return ServePlan(lines, room.spare, slots)


def nowhere(recipe: ServeRecipe, models: Collection[str], keys: Sequence[ApiKey]) -> list[str]:
    """Names in routes, rules and keys that lead to nothing as yet: a slip, or a model that is still to be trained.

    `models`: the registered ones. Pure.
    """
    there = {*recipe.routes, *(models if recipe.models else ())}
    asked = there.union(*(rule.when.model for rule in recipe.rules), (ANY_NAME,) if recipe.rules else ())
    found = [f"route {name}: no version of a model '{each.model}' is registered"
             for name, each in recipe.routes.items() if each.model and each.model not in models]  # fmt: skip
    found += [f"rule {number}: no route or registered model '{rule.route}'"
              for number, rule in enumerate(recipe.rules, start=1) if rule.route not in there]  # fmt: skip
    found += [f"key {key.name}: no route or registered model '{name}'"
              for key in keys if not key.revoked for name in key.routes or () if name not in asked]  # fmt: skip
    return found


def _line(
    each: Wanted, routes: Mapping[str, str], loaded: set[str], refused: Mapping[str, str], keep: Collection[str]
) -> Line:
    names, answers = [version.name for version in each.versions], routes.get(each.model, "")
    missing = [name for name in names if name not in loaded and name not in refused]
    todo = [f"load and probe {name}" for name in missing if name in keep]
    if names and answers != each.champion and each.champion in keep:
        todo.append(f"lead {each.model} to {each.champion}")
    notes = [each.closed] if each.closed else []
    notes += [f"{name} was refused: {refused[name]}" for name in names if name in refused]
    notes += [f"{name} is loaded when it is asked for" for name in missing if name not in keep]
    notes += [f"canary {each.canary} at {each.rollout.percent:g}%"] if each.rollout else []
    held = tuple(name for name in names if name in loaded)
    return Line(each.model, each.champion, answers, held, tuple(todo), tuple(notes))

"""How the engines of one card share it: what each is started with, what it takes, and whether they all fit at once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from registry.base_models import base_path
from registry.candidates import available, profile_for
from registry.cards import GIB, Card, as_set
from registry.errors import BaseModelError, DoesNotFit
from registry.geometry import geometry_of
from registry.plan_place import Place
from registry.plan_serving import Served, ServeWish, plan_serving, plan_servings
from registry.project import Project
from registry.serve_memory import Precision
from registry.settings import Settings
from serving.vllm_process import EngineConfig, engine_memory

BOTH: tuple[Precision, ...] = ("bf16", "bitsandbytes")


@dataclass(frozen=True)
class CardPlan:
    """`needs` in bytes by engine, of `room` on the card; `served` has the planner's word where there is one (GPUs)."""

    room: int
    needs: Mapping[str, int] = field(default_factory=dict)
    served: Mapping[str, Served] = field(default_factory=dict)

    @property
    def together(self) -> bool:
        return sum(self.needs.values()) <= self.room


def plan_card(project: Project, card: Card, configs: Sequence[EngineConfig], always: frozenset[str]) -> CardPlan:
    """For all engines of that card; those in `always` have to fit at once, the others beside them, one at a time.

    Raises DoesNotFit. One engine alone on a CPU is not measured.
    """
    wishes = None if card.is_cpu else _wishes(project, configs)
    if wishes is None:
        plan = _by_size(project, card, configs)
    else:
        profile = profile_for(card)
        place = Place(card.name, profile, available(card, profile), total=card.memory)
        plan = plan_wishes(place, wishes, always)
    _refuse_too_much(card, plan, always)
    return plan


def planned_alone(project: Project, settings: Settings, config: EngineConfig) -> EngineConfig:
    """The config with the planner's word for an engine that has the card to itself. Raises DoesNotFit."""
    [card] = as_set([config.card], settings.cards)
    served = plan_card(project, card, [config], frozenset({config.name})).served.get(config.name)
    return config if served is None else replace(config, planned=served)


def plan_wishes(place: Place, wishes: Sequence[ServeWish], always: frozenset[str]) -> CardPlan:
    """Pure. All at once where that fits; else those on demand each in the room that the others leave."""
    found = plan_servings(wishes, place)
    if not all(each.fits for each in found):
        stay, come = ([each for each in wishes if (each.name in always) is side] for side in (True, False))
        largest = sorted(come, key=lambda each: plan_serving(each, place).memory.high)[-1:]
        found = plan_servings([*stay, *largest], place)[: len(stay)]
        left = replace(place, available=place.bytes - sum(_bytes(each, place) for each in found))
        found += [plan_serving(each, left) for each in come]
    needs = {each.name: _bytes(each, place) for each in found}
    return CardPlan(place.bytes, needs, {each.name: each for each in found})


def _bytes(served: Served, place: Place) -> int:
    # One that may not fit is tried all the same where it could: only what the planner takes for sure is held against it
    return round(served.utilization * place.whole) if served.fits else served.memory.low


def _wishes(project: Project, configs: Sequence[EngineConfig]) -> list[ServeWish] | None:
    """None where the shape of one is not known: then vLLM is left to its own defaults."""
    found = []
    for each in configs:
        try:
            geometry = geometry_of(_config_json(base_path(project, each.base)), each.base.source)
        except BaseModelError:
            return None
        precisions = BOTH if each.precision == "auto" else (each.precision,)
        found.append(
            ServeWish(geometry, each.serve.max_context, each.serve.concurrency, each.max_loras, each.max_rank,
                      precisions, name=each.name)
        )  # fmt: skip
    return found


def _config_json(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))


def _by_size(project: Project, card: Card, configs: Sequence[EngineConfig]) -> CardPlan:
    needs = {each.name: engine_memory(base_path(project, each.base), each) for each in configs}
    if len(needs) == 1:
        return CardPlan(max(card.free, *needs.values()), needs)
    return CardPlan(card.free, needs)


def _refuse_too_much(card: Card, plan: CardPlan, always: frozenset[str]) -> None:
    stay = sum(plan.needs[name] for name in always)
    for name, needs in plan.needs.items():
        together = stay if name in always else stay + needs
        if together > plan.room:
            beside = ", ".join(sorted(always - {name}))
            with_them = f" beside {beside}" if beside else ""
            raise DoesNotFit(
                f"engine '{name}' does not fit{with_them}: {together / GIB:.1f} GiB of {plan.room / GIB:.1f}",
                place=f"card {card.name}",
                fix="`start: demand` lets engines take turns; or less `max_context`, `memory_gb`, another `card:`",
            )

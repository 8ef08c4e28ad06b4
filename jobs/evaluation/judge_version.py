"""Judges a version again, from what its row says: its recipe, its dataset version and its base model."""

from __future__ import annotations

import json
import math
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jobs.evaluation.ask_rows import Progress
from jobs.evaluation.evaluate import EvalRequest, Subject, evaluate, kept_scores
from registry.adapters import Version, aliases
from registry.base_models import BaseModel
from registry.candidates import available, profile_for, serve_wish
from registry.card_profiles import GIB
from registry.cards import Card, as_set, pick_card
from registry.dataset_versions import Pinned, materialise
from registry.errors import BaseModelError, DoesNotFit
from registry.gates import Judgement, judge
from registry.geometry import geometry_of
from registry.plan import Place, plan_serving
from registry.project import Project
from registry.recipe import Finetune
from registry.scores import Scored
from registry.settings import Settings
from registry.store import Store
from serving.control import engine_for, server_status


async def judge_version(
    project: Project, store: Store, settings: Settings, version: Version, progress: Progress
) -> Judgement:
    """What the gate says of the version now, against the champion of now; the caller keeps the verdict.

    Raises DataError if its dataset version is gone, EngineError if no engine can be had.
    """
    recipe, base = recipe_of(version), base_of(version)
    pinned = dataset_of(version)
    champion = aliases(store, version.model).get("champion")
    with unpacked(project, pinned) as data:
        request = EvalRequest.for_version(
            project, store, recipe, base, {"hash": pinned.hash}, data,
            candidate=version.version, champion=champion,
        )  # fmt: skip
        scores = await _scores(project, store, settings, request, recipe, base, progress)
    return judge(recipe.gate, recipe.evaluate.task, scores["candidate"], scores.get("champion"), scores["base"])


async def score_versions(
    project: Project,
    store: Store,
    settings: Settings,
    versions: list[Version],
    pinned: Pinned,
    progress: Progress,
    *,
    with_base: bool,
) -> dict[str, Scored]:
    """Scores by name, on the dataset version `pinned`, by the first version's task; an engine per base."""
    recipe = recipe_of(versions[0])
    found: dict[str, Scored] = {}
    with unpacked(project, pinned) as data:
        for base in {version.body["base"]["digest"]: base_of(version) for version in versions}.values():
            there = [each for each in versions if each.body["base"]["digest"] == base.digest]
            subjects = [Subject.of(project, each.name, each) for each in there]
            bare = [Subject.bare(base)] if with_base else []
            request = EvalRequest.made(recipe, base, pinned.hash, data, [*subjects, *bare])
            scores = await _scores(project, store, settings, request, recipe_of(there[0]), base, progress)
            found |= {name if name != "base" else f"base {base.source}": each for name, each in scores.items()}
    return found


def recipe_of(version: Version) -> Finetune:
    """The recipe as it was when the version was made."""
    return Finetune.model_validate(version.body["recipe"])


def base_of(version: Version) -> BaseModel:
    return BaseModel(**version.body["base"])


def dataset_of(version: Version) -> Pinned:
    """The dataset version that it was trained on; its test split is what it was judged by."""
    return Pinned(**version.body["dataset"])


@contextmanager
def unpacked(project: Project, pinned: Pinned) -> Iterator[Path]:
    """The dataset version's files in a folder that is gone after the block."""
    folder = project.home / "tmp" / f"evaluate-{uuid.uuid4().hex[:8]}"
    try:
        materialise(project, pinned, folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def _scores(
    project: Project,
    store: Store,
    settings: Settings,
    request: EvalRequest,
    recipe: Finetune,
    base: BaseModel,
    progress: Progress,
) -> dict[str, Scored]:
    """Kept scores where all are, else with an engine: starting one takes a minute."""
    kept = kept_scores(store, request)
    if len(kept) == len(request.asked):
        return {subject.role: kept[subject.role] for subject in request.asked}
    card = pick_card("auto" if recipe.card == "runpod" else recipe.card)
    _refuse_unserved(project, store, settings, recipe, base, card)
    rank = max((subject.rank for subject in request.asked), default=0)
    async with engine_for(project, store, settings, base, recipe.serve, card, rank) as engine:
        return await evaluate(project, store, engine, request, progress)


def _refuse_unserved(
    project: Project, store: Store, settings: Settings, recipe: Finetune, base: BaseModel, card: Card
) -> None:
    """Raises DoesNotFit where the card cannot serve the base: vLLM would take minutes to find that out."""
    config, status = project.models / base.folder / "config.json", server_status(store)
    if not config.exists() or (status and status.engine_on(base.digest)):
        return
    try:
        geometry = geometry_of(json.loads(config.read_text(encoding="utf-8")), base.source)
    except BaseModelError:  # a shape that nobody knows may be served all the same
        return
    [card] = as_set([card], settings.cards)
    place = Place(card.name, profile := profile_for(card), available(card, profile), total=card.memory)
    found = plan_serving(serve_wish(recipe, geometry), place)
    if found.memory.low > found.available:
        raise DoesNotFit(
            f"it cannot serve {base.source}: {found.limit}", place=f"card {card.name}",
            fix=f"do it on a host with a card of {math.ceil(found.memory.high / GIB)} GiB or more, or `ft run` the "
            "recipe with `cloud:`, which evaluates in a pod",
        )  # fmt: skip

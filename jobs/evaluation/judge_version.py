"""Judges a version again, from what its row says: its recipe, its dataset version and its base model."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jobs.evaluation.ask_rows import Progress
from jobs.evaluation.evaluate import EvalRequest, Subject, evaluate, kept_scores
from registry.adapters import Version, aliases
from registry.base_models import BaseModel
from registry.cards import pick_card
from registry.dataset_versions import Pinned, materialise
from registry.gates import Judgement, judge
from registry.project import Project
from registry.recipe import Finetune
from registry.scores import Scored
from registry.settings import Settings
from registry.store import Store
from serving.control import engine_for


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
    card = pick_card(recipe.card)
    rank = max((subject.rank for subject in request.asked), default=0)
    async with engine_for(project, store, settings, base, recipe.serve, card, rank) as engine:
        return await evaluate(project, store, engine, request, progress)

"""Which target does a run's job, as its plan says: a card here, with its folder here or in the bucket, or a pod."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs.rent import Offer
from jobs.targets.bucket_card import BucketCard
from jobs.targets.local_card import LocalCard
from jobs.targets.runpod_pod import Rent, RunPodPod
from jobs.targets.target import Target
from registry.base_models import parse_reference
from registry.bucket import Bucket, open_bucket
from registry.budgets import run_cap
from registry.cards import pick_card
from registry.errors import RecipeError
from registry.project import Project
from registry.recipe import Finetune, expand
from registry.rentals import rentals
from registry.runpod_api import RunPod, open_runpod
from registry.settings import Settings
from registry.store import Store

RUNPOD = "runpod"
_made: list[tuple[Settings, RunPod, Bucket]] = []
_buckets: list[tuple[Settings, Bucket]] = []


def target_of(project: Project, store: Store, settings: Settings, recipe: Finetune, plan: dict[str, Any]) -> Target:
    """`plan` is what the step "plan" has written down (`rent`, `card`, `base`)."""
    if plan.get("rent"):
        return RunPodPod(store, settings, *_connections(settings), _rent(project, recipe, plan))
    if plan.get("through"):
        return BucketCard(project, pick_card(plan["card"]), bucket_of(settings), settings)
    return LocalCard(project, pick_card(plan["card"]), settings.trainer_python)


def bucket_of(settings: Settings) -> Bucket:
    """One for all jobs of this process."""
    if not _buckets or _buckets[0][0] is not settings:
        _buckets[:] = [(settings, open_bucket(settings))]
    return _buckets[0][1]


def evaluation_target(
    project: Project, store: Store, settings: Settings, recipe: Finetune, plan: dict[str, Any], run_id: str
) -> RunPodPod:
    """The pod of an evaluation, whose folder lies in the run's. It may cost all that the run has left."""
    found = _rent(project, recipe, {**plan, "rent": plan["rent_to_evaluate"]})
    # `ft pods extend` may have let the run cost more than its recipe does.
    caps = [float(each.body["cap_usd"]) for each in rentals(store, job=run_id)]
    max_usd = max([run_cap(recipe.budget.max_usd, settings.budgets, run_id), *caps])
    return RunPodPod(store, settings, *_connections(settings), replace(found, run=run_id, max_usd=max_usd))


def _rent(project: Project, recipe: Finetune, plan: dict[str, Any]) -> Rent:
    if recipe.cloud is None:
        raise RecipeError("a pod was planned, and the recipe has no `cloud`", place=recipe.name)
    rent = plan["rent"]
    return Rent(
        recipe=recipe.name, model=recipe.model, terms=recipe.cloud,
        offers=tuple(Offer(**each) for each in rent["offers"]),
        # Less than the recipe's where a part is held back for the evaluation.
        reserve_usd=rent["reserve_usd"], max_usd=rent.get("max_usd", recipe.budget.max_usd),
        base=base_to_send(project, recipe, plan["base"]), token=expand(recipe.base.token, "base.token") or "",
    )  # fmt: skip


def base_to_send(project: Project, recipe: Finetune, base: dict[str, Any]) -> Path | None:
    """A base model that lies in a folder here can be fetched from nowhere else."""
    local = parse_reference(recipe.base.model, project.root).kind == "local"
    return project.models / base["folder"] if local else None


def _connections(settings: Settings) -> tuple[RunPod, Bucket]:
    """One of each for all jobs of this process: a connection takes longer to make than most questions to answer."""
    if not _made or _made[0][0] is not settings:
        _made[:] = [(settings, open_runpod(settings), bucket_of(settings))]
    return _made[0][1:]

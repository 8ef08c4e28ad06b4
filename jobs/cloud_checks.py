"""What must be there before a run may rent anything: asked at once, because each would cost money to find out later."""

from __future__ import annotations

import difflib
from contextlib import closing

from jobs.pod_env import pod_bucket
from registry.bucket import open_bucket
from registry.budgets import run_cap
from registry.cloud_terms import CloudTerms
from registry.errors import MissingPart, RecipeError
from registry.recipe import Finetune
from registry.runpod_api import open_runpod
from registry.settings import Settings

PATIENCE_SECONDS = 10.0


def check_cloud(settings: Settings, recipe: Finetune) -> None:
    """RunPod's key and card names, the bucket and the pods' key for it, the image, the budget.

    Raises WrongKey, CloudError, BucketError, BudgetError, MissingPart, RecipeError.
    """
    assert recipe.cloud is not None
    run_cap(recipe.budget.max_usd, settings.budgets, recipe.name)
    pod_image(settings, recipe.cloud)
    with open_runpod(settings, patience_s=PATIENCE_SECONDS) as cloud:
        _check_names(recipe, [each.id for each in cloud.gpus()])
    with closing(open_bucket(settings)) as ours:
        ours.check()
    with closing(pod_bucket(settings)) as theirs:
        theirs.check()


def pod_image(settings: Settings, terms: CloudTerms) -> str:
    """The image that a pod starts. Raises MissingPart."""
    if image := terms.image or settings.runpod_image:
        return image
    raise MissingPart(
        "no image for pods is named", place="runpod_image",
        fix="build and push jobs/image/Dockerfile (docs/cloud.md), then set FT_RUNPOD_IMAGE in .env",
    )  # fmt: skip


def _check_names(recipe: Finetune, there: list[str]) -> None:
    assert recipe.cloud is not None
    for name in recipe.cloud.gpus:
        if name not in there:
            near = difflib.get_close_matches(name, there, n=1, cutoff=0.3)
            raise RecipeError(
                f"RunPod has no card '{name}'", place=f"{recipe.name}: cloud.gpus",
                fix=f"did you mean '{near[0]}'?" if near else f"there is: {', '.join(sorted(there))}",
            )  # fmt: skip

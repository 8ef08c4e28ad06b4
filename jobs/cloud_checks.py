"""What must be there before a run may rent anything: asked at once, because each would cost money to find out later."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import time
from contextlib import closing, suppress
from pathlib import Path

from jobs.pod_env import pod_bucket
from registry.bucket import open_bucket
from registry.budgets import run_cap
from registry.cloud_terms import CloudTerms
from registry.errors import MissingPart, RecipeError
from registry.project import Project
from registry.recipe import Finetune
from registry.runpod_api import open_runpod
from registry.settings import Settings

PATIENCE_SECONDS = 10.0
# Who runs one recipe after the other waits for the same answers once: they took half of the time until a pod was asked
# for. The keys are used again before anything is made, so one that was withdrawn meanwhile costs no money either.
KEPT_SECONDS = 600.0
AWS_KEYS = ("RUNPOD_API_KEY", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE")


def check_cloud(project: Project, settings: Settings, recipe: Finetune) -> None:
    """RunPod's key and card names, the bucket and the pods' key for it, the image, the budget.

    What was well is believed for ten minutes. Raises WrongKey, CloudError, BucketError, BudgetError, MissingPart,
    RecipeError.
    """
    assert recipe.cloud is not None
    run_cap(recipe.budget.max_usd, settings.budgets, recipe.name)
    pod_image(settings, recipe.cloud)
    kept, asked = project.home / "cloud-checked.json", _fingerprint(settings)
    names = _kept(kept, asked)
    if names is None:
        names = _ask(settings)
        _keep(kept, asked, names)
    _check_names(recipe, names)


def pod_image(settings: Settings, terms: CloudTerms) -> str:
    """The image that a pod starts. Raises MissingPart."""
    if image := terms.image or settings.runpod_image:
        return image
    raise MissingPart(
        "no image for pods is named", place="runpod_image",
        fix="build and push jobs/image/Dockerfile (docs/cloud.md), then set FT_RUNPOD_IMAGE in .env",
    )  # fmt: skip


def _ask(settings: Settings) -> list[str]:
    """Use every key once; the names of RunPod's cards."""
    with open_runpod(settings, patience_s=PATIENCE_SECONDS) as cloud:
        names = [each.id for each in cloud.gpus()]
    with closing(open_bucket(settings)) as ours:
        ours.check()
    with closing(pod_bucket(settings)) as theirs:
        theirs.check()
    return names


def _fingerprint(settings: Settings) -> str:
    """Of all that the answers rest on; a digest, because keys are among it."""
    names = ("runpod_url", "runpod_api_key", "bucket", "s3_endpoint", "s3_region", "s3_access_key", "s3_secret_key",
             "pod_s3_access_key", "pod_s3_secret_key")  # fmt: skip
    said = [getattr(settings, name) for name in names] + [os.environ.get(name, "") for name in AWS_KEYS]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _kept(file: Path, asked: str) -> list[str] | None:
    """The names of RunPod's cards, if the same was well a short while ago."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["asked"] == asked and 0 <= time.time() - float(content["time"]) < KEPT_SECONDS:
            return [str(each) for each in content["gpus"]]
    return None


def _keep(file: Path, asked: str, names: list[str]) -> None:
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps({"asked": asked, "time": time.time(), "gpus": names}), encoding="utf-8")
        partial.replace(file)
    except OSError:  # the next run asks again
        partial.unlink(missing_ok=True)


def _check_names(recipe: Finetune, there: list[str]) -> None:
    assert recipe.cloud is not None
    for name in recipe.cloud.gpus:
        if name not in there:
            near = difflib.get_close_matches(name, there, n=1, cutoff=0.3)
            raise RecipeError(
                f"RunPod has no card '{name}'", place=f"{recipe.name}: cloud.gpus",
                fix=f"did you mean '{near[0]}'?" if near else f"there is: {', '.join(sorted(there))}",
            )  # fmt: skip

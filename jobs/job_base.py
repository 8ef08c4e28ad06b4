"""A job's base model on a machine that has only the job's folder: sent through the bucket, or fetched again."""

from __future__ import annotations

import sys
import time
from contextlib import suppress

from jobs.fetch_base import fetch_base
from registry.base_models import BaseModel, base_path, parse_reference
from registry.errors import BaseModelError, FtError
from registry.file_locks import alone
from registry.job_bucket import JobBucket
from registry.job_folder import JobFolder
from registry.project import Project, cache_folder
from registry.recipe import Base, Finetune

BASE_TRIES, BASE_WAIT = 3, 5.0


def base_here(remote: JobBucket, job: JobFolder) -> None:
    """The base model in the cache, of the very content that the job names. Raises BaseModelError without it."""
    base, project = BaseModel(**job.spec()["base"]), Project(root=job.path, home=job.path, cache=cache_folder())
    with suppress(BaseModelError):
        base_path(project, base)
        return
    with alone(project.models / f".{base.folder}.lock"):
        _get(remote, job, project, base)


def _get(remote: JobBucket, job: JobFolder, project: Project, base: BaseModel) -> None:
    with suppress(BaseModelError):  # another job was faster
        base_path(project, base)
        return
    if not remote.fetch_model(project.models / base.folder):
        _bring(project, base, Finetune.model_validate(job.recipe()).base)
    base_path(project, base)


def _bring(project: Project, base: BaseModel, wanted: Base) -> None:
    if parse_reference(wanted.model, project.root).kind == "hub":
        wanted = wanted.model_copy(update={"revision": base.revision})
    for left in reversed(range(BASE_TRIES)):
        try:
            found = fetch_base(project, wanted)
            break
        except FtError as error:
            if not left:
                raise
            print(error, file=sys.stderr, flush=True)
            time.sleep(BASE_WAIT)
    if found.digest != base.digest:
        raise BaseModelError(
            f"the base model {base.source} that was fetched here is not the one that the job names",
            place=f"digest {found.digest[:12]}, wanted {base.digest[:12]}",
            fix="name its revision in the recipe (`base.revision`), and run again",
        )

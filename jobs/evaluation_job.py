"""An evaluation as a job folder, inside its run's: who is asked what, with data and adapters. Written here, read there.

spec.json           as a training's, with kind `evaluate`; `asked` are the subjects, by what their scores are kept
data                the run's data
adapters/<digest>/  those that are asked
checkpoints/        answers up to now (jobs/answer_book.py)
result.json         ok: `scores` by key, each with its answers
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from jobs.evaluation.evaluate import EvalRequest, Subject, picked_rows, subject_key
from registry.base_models import BaseModel
from registry.job_folder import EVALUATION, JobFolder, evaluation_number
from registry.project import Project
from registry.recipe import Finetune
from registry.settings import Settings

KIND = "evaluate"
# Settings that the evaluator's vLLM has of ours.
ENGINE = ("vllm", "engine_start_seconds")
Scores = dict[str, dict[str, Any]]


def write_evaluation(
    project: Project, settings: Settings, run_id: str, recipe: Finetune, base: BaseModel, request: EvalRequest,
    asked: Iterable[Subject],
) -> JobFolder:  # fmt: skip
    """The next evaluation of the run, of those of the request's subjects that are to be `asked`."""
    folder = project.job_folder(run_id)
    number = max((evaluation_number(job.path) for job in JobFolder(folder).evaluations()), default=0) + 1
    job = JobFolder(folder / f"{EVALUATION}{number}")
    # Without a spec it is what is left of one who was killed here.
    shutil.rmtree(job.path, ignore_errors=True)
    (job.path / "adapters").mkdir(parents=True)
    job.data.symlink_to(Path("..") / "data", target_is_directory=True)
    rows, subjects = picked_rows(request), []
    for each in asked:
        sent = replace(each, folder=f"adapters/{each.digest}" if each.folder else "")
        if each.folder and not (job.path / sent.folder).is_symlink():
            (job.path / sent.folder).symlink_to(project.home / each.folder, target_is_directory=True)
        subjects.append({**asdict(sent), "key": subject_key(request, each, rows)})
    job.write_spec({
        "job": f"{run_id}/{job.name}", "kind": KIND, "recipe": recipe.model_dump(mode="json"), "base": base.as_dict(),
        "dataset": request.dataset, "asked": subjects,
        "engine": {name: getattr(settings, name) for name in ENGINE},
    })  # fmt: skip
    return job


def request_of(job: JobFolder) -> EvalRequest:
    """What the job asks; the subjects' folders are relative to the job's."""
    spec = job.spec()
    subjects = [Subject(**{name: value for name, value in each.items() if name != "key"}) for each in spec["asked"]]
    recipe, base = Finetune.model_validate(spec["recipe"]), BaseModel(**spec["base"])
    return EvalRequest.made(recipe, base, spec["dataset"], job.data, subjects)


def scores_in(job: JobFolder) -> Scores:
    """`scored` and `answers` by key, of an evaluation that is done; nothing of another."""
    result = job.result() or {}
    return dict(result["scores"]) if result.get("status") == "ok" else {}


def is_whole(job: JobFolder) -> bool:
    """Are the adapters that are asked still there? An old champion's may have been pruned."""
    return all(each.exists() for each in (job.path / "adapters").iterdir())


def keys_asked(job: JobFolder) -> set[str]:
    return {str(each["key"]) for each in job.spec()["asked"]}

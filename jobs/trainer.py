"""`python -m jobs.trainer FOLDER`: does the job in the folder, on whatever machine it lies.

Claims the job, trains from the last complete checkpoint on, publishes one result. SIGTERM or stop.json: saves a
checkpoint and stops. Knows neither DBOS nor MLflow: it only writes files, so neither can stop it.
Exit codes: 0 the job has an accepted result, 1 it failed, 3 stopped, 4 somebody else has the job.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from jobs.claim import Claim, do_job
from jobs.trainers.task import Backend, BadData, Task, Trained
from registry.base_models import BaseModel, base_path
from registry.errors import FtError, RecipeError
from registry.job_folder import JobFolder
from registry.manifest import write_manifest
from registry.project import Project, cache_folder
from registry.recipe import Finetune

BACKENDS = {"trl": "jobs.trainers.trl_sft"}
MESSAGE = 2000
# Said by PyTorch's CPU allocator, by CUDA itself, by cuBLAS, by oneDNN (seen on a CPU with too little memory), and by a
# thread that finds no room for its stack.
NO_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED", "std::bad_alloc", "could not create a primitive",
             "could not create a memory object", "can't start new thread")  # fmt: skip


def main() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(run_job(JobFolder(Path(sys.argv[1]).resolve())))


def run_job(job: JobFolder, backend_of: Callable[[str], Backend] | None = None) -> int:
    """Do the job unless it is done; the exit code. `backend_of` gives what trains, by the recipe's name for it."""
    return do_job(job, lambda claim: _attempt(job, claim, backend_of or _backend), job.work / "adapter")


def _attempt(job: JobFolder, claim: Claim, backend_of: Callable[[str], Backend]) -> dict[str, Any]:
    """Train; the result, whatever happened."""
    started = time.monotonic()
    try:
        task = _task(job, claim)
        backend = backend_of(task.recipe.train.backend)
        trained = backend.train(task)
        claim.flush()
        if trained.stopped is None:
            _finish_adapter(task, backend)
        return _result(trained, int(task.recipe.train.batch), time.monotonic() - started)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        claim.flush()
        return _failure(claim.at, _explain(error, job), time.monotonic() - started)


def _task(job: JobFolder, claim: Claim) -> Task:
    spec, recipe = job.spec(), Finetune.model_validate(job.recipe())
    if recipe.train.batch == "auto":
        raise RecipeError(
            "train.batch is still `auto`: the plan puts a number in its place before a job is written",
            place=str(job.path), fix="`ft run` the recipe again, or write a number for train.batch",
        )  # fmt: skip
    base = BaseModel(**spec["base"])
    # A trainer has no project: of its paths only the cache matters here.
    project = Project(root=job.path, home=job.path, cache=cache_folder())
    shutil.rmtree(job.work, ignore_errors=True)
    job.work.mkdir()
    return Task(
        job=job,
        recipe=recipe,
        base=base_path(project, base),
        base_digest=base.digest,
        epoch=claim.epoch,
        report=claim.report,
        ship=claim.flush,
        stop=claim.stop_reason,
    )


def _backend(name: str) -> Backend:
    return cast(Backend, importlib.import_module(BACKENDS[name]))


def _finish_adapter(task: Task, backend: Backend) -> None:
    made = task.job.work / "adapter"
    task.report({"stage": "fingerprint"})
    (made / "fingerprint.json").write_text(json.dumps(backend.fingerprint(task)), encoding="utf-8")
    write_manifest(made, base=task.base_digest, recipe=task.recipe.name)


def _result(trained: Trained, batch: int, seconds: float) -> dict[str, Any]:
    return {
        "status": "stopped" if trained.stopped else "ok",
        "message": trained.stopped or "",
        "steps": trained.steps,
        "tokens": trained.tokens,
        "loss": trained.loss,
        "eval_loss": trained.eval_loss,
        "peak_memory": trained.peak_memory,
        "seconds": round(seconds, 2),
        "train_seconds": round(trained.seconds, 2),
        "tokens_per_second": round(trained.tokens / trained.seconds, 1) if trained.seconds else None,
        "batch": batch,
        "longest": trained.longest,
        "card": trained.card,
        "smoke_seconds": trained.smoke.seconds if trained.smoke else None,
        "smoke_memory": trained.smoke.peak_memory if trained.smoke else None,
    }


def _failure(at: dict[str, Any], why: dict[str, Any], seconds: float) -> dict[str, Any]:
    """`at` is the last stage's progress line: of a smoke it has the rows and tokens that were tried."""
    tried = ""
    if at["stage"] == "smoke":
        tried = f"in the smoke, with {at.get('rows')} rows of up to {at.get('longest')} tokens: "
    return {"status": "failed", **at, **why, "message": tried + why["message"], "seconds": round(seconds, 2)}


def _explain(error: BaseException, job: JobFolder) -> dict[str, Any]:
    """Class and message of a failure; the class decides whether trying again can help."""
    if isinstance(error, BadData):
        return {"class": "bad_data", "message": str(error)}
    if isinstance(error, FtError):
        return {"class": "bad_input", "message": str(error)}
    if _is_disk_full(error, job):
        shutil.rmtree(job.work, ignore_errors=True)
        job.prune_checkpoints(keep=2)
        return {"class": "disk_full", "message": f"the disk is full: {job.path}"}
    if _is_out_of_memory(error):
        return {"class": "out_of_memory", "message": str(error)[:MESSAGE]}
    if isinstance(error, FloatingPointError):
        return {"class": "diverged", "message": str(error)}
    return {"class": "crash", "message": f"{type(error).__name__}: {error}"}


def _is_out_of_memory(error: BaseException) -> bool:
    """Only a GPU's allocator has a class of its own for it; a CPU's and the libraries say it in words."""
    return any(
        isinstance(each, MemoryError)
        or type(each).__name__ == "OutOfMemoryError"
        or getattr(each, "errno", None) == errno.ENOMEM
        or (isinstance(each, RuntimeError) and any(words in str(each) for words in NO_MEMORY))
        for each in _chain(error)
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what led to it."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _is_disk_full(error: BaseException, job: JobFolder) -> bool:
    # safetensors and torch wrap ENOSPC into errors of their own, without an errno.
    if any(getattr(each, "errno", None) == errno.ENOSPC or "No space left" in str(each) for each in _chain(error)):
        return True
    return "PytorchStreamWriter" in str(error) and shutil.disk_usage(job.path).free < 1 << 20


if __name__ == "__main__":
    main()

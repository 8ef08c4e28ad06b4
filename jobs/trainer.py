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
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from jobs.pod_env import claims_of
from jobs.trainers.task import Backend, BadData, Task, Trained
from registry.base_models import BaseModel, base_path
from registry.errors import BucketError, FtError, RecipeError
from registry.job_folder import Held, JobFolder, LeaseLost
from registry.manifest import write_manifest
from registry.project import Project, cache_folder
from registry.recipe import Finetune

BACKENDS = {"trl": "jobs.trainers.trl_sft"}
RENEW_SECONDS = 5.0
PROGRESS_SECONDS = 1.0
MESSAGE = 2000
# Said by PyTorch's CPU allocator, by CUDA itself, by cuBLAS, by oneDNN (seen on a CPU with too little memory), and by a
# thread that finds no room for its stack.
NO_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED", "std::bad_alloc", "could not create a primitive",
             "could not create a memory object", "can't start new thread")  # fmt: skip
OK, FAILED, STOPPED, TAKEN = 0, 1, 3, 4


def main() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(run_job(JobFolder(Path(sys.argv[1]).resolve())))


def run_job(job: JobFolder, backend_of: Callable[[str], Backend] | None = None) -> int:
    """Do the job unless it is done; the exit code. `backend_of` gives what trains, by the recipe's name for it."""
    done = job.result()
    if done and done["status"] == "ok":
        return OK
    try:
        claim = Claim(job)
    except LeaseLost:
        return TAKEN
    with claim.kept(), _sigterm_asks_to_stop(claim):
        result = _attempt(job, claim, backend_of or _backend)
        return claim.publish(result)


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


class Claim:
    """The trainer's hold on the job: renewed by a thread, lost for good once a renewal fails."""

    def __init__(self, job: JobFolder) -> None:
        self.job, self.claims = job, claims_of(job)
        self.held: Held = self.claims.claim(f"{socket.gethostname()}/{os.getpid()}", self.claims.lease())
        self.epoch = self.held.lease.epoch
        self.lines: list[dict[str, Any]] = []
        self.at: dict[str, Any] = {"stage": "load"}
        self.files = 0
        self.written = time.monotonic()
        self.stopping: str | None = None
        # One for the lines and one for the lease: a bucket that hangs must not stop who reports a step.
        self.lock, self.leasing = threading.Lock(), threading.Lock()
        self.over = threading.Event()

    @contextmanager
    def kept(self) -> Iterator[None]:
        thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self.over.set()
            thread.join(timeout=RENEW_SECONDS)

    def report(self, line: dict[str, Any]) -> None:
        """Add a progress line; shipped in batches of a second, and a new stage at once: it may last minutes."""
        if "stage" in line:
            self.at = line
        elif "step" in line:
            self.at = {"stage": "train"}
        with self.lock:
            self.lines.append({"time": time.time(), "epoch": self.epoch, **line})
        if "stage" in line or time.monotonic() - self.written > PROGRESS_SECONDS:
            self.flush()

    def flush(self) -> None:
        with self.lock:
            lines, self.lines = self.lines, []
            if lines:
                self.files += 1
                try:
                    self.job.add_progress(self.epoch, self.files, lines)
                except OSError:
                    # A full disk ends the run where the checkpoint is saved, with that as its reason.
                    traceback.print_exc()
        self.written = time.monotonic()

    def stop_reason(self) -> str | None:
        return self.stopping or self.job.stop_reason()

    def publish(self, result: dict[str, Any]) -> int:
        """Make the result the one that counts; a trainer that has lost its lease publishes nothing."""
        try:
            with self.leasing:
                adapter = self.job.work / "adapter" if result["status"] == "ok" else None
                self.held = self._accept(result, adapter)
        except LeaseLost:
            return TAKEN
        shutil.rmtree(self.job.work, ignore_errors=True)
        return {"ok": OK, "stopped": STOPPED}.get(result["status"], FAILED)

    def _accept(self, result: dict[str, Any], adapter: Path | None) -> Held:
        """Tried until somebody else may have the job: it took hours to come so far."""
        end = time.monotonic() + self.claims.term / 2
        while True:
            try:
                return self.claims.accept(self.held, result, adapter)
            except BucketError as error:
                print(error, file=sys.stderr, flush=True)
                if time.monotonic() > end:
                    raise
                time.sleep(RENEW_SECONDS)

    def _renew(self) -> None:
        renewed = time.monotonic()
        while not self.over.wait(min(RENEW_SECONDS, self.claims.term / 6)):
            try:
                with self.leasing:
                    self.held = self.claims.renew(self.held)
                renewed = time.monotonic()
            except LeaseLost:
                self.stopping = "another trainer has taken the job over"
                return
            except OSError:
                traceback.print_exc()
            except BucketError as error:
                print(error, file=sys.stderr, flush=True)
                # By the full term somebody else may take the job over.
                if time.monotonic() - renewed > self.claims.term / 2:
                    self.stopping = "the bucket was away for too long"


@contextmanager
def _sigterm_asks_to_stop(claim: Claim) -> Iterator[None]:
    def ask(*_: Any) -> None:
        claim.stopping = "stopped by SIGTERM"

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    main()

"""`python -m jobs.evaluator FOLDER`: does the evaluation in the folder, on the card of the machine that it lies on.

Claims the job as a trainer does, starts vLLM in an environment of its own, asks every subject the picked rows, and
publishes one result. What was answered is kept in checkpoints. Knows neither DBOS nor the project's store.
Exit codes are the trainer's (`jobs/claim.py`).
"""

from __future__ import annotations

import asyncio
import sys
import time
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs.answer_book import AnswerBook
from jobs.claim import Claim, do_job
from jobs.evaluation.ask_rows import Patience
from jobs.evaluation.evaluate import EvalRequest, Subject, counted, picked_rows, score_subject, subject_key
from jobs.evaluation_job import Scores, request_of
from registry.admission import RANKS, admit
from registry.base_models import BaseModel
from registry.cards import pick_card, try_lock
from registry.errors import EngineError, FtError, MissingPart
from registry.job_folder import JobFolder
from registry.project import Project, cache_folder
from registry.recipe import Finetune
from registry.settings import Settings
from serving.engine import Engine
from serving.vllm_process import EngineConfig, engine_rank, start_vllm

ENGINE_DEATHS = 3
LOOK_SECONDS, SAVE_SECONDS = 0.25, 5.0


class Stopped(Exception):
    """Somebody asked to stop, or the lease is lost."""


def main() -> None:
    sys.exit(evaluate_job(JobFolder(Path(sys.argv[1]).resolve())))


def evaluate_job(job: JobFolder, patience: Patience | None = None) -> int:
    """Do the job unless it is done; the exit code."""
    return do_job(job, lambda claim: _attempt(job, claim, patience or Patience()))


def _attempt(job: JobFolder, claim: Claim, patience: Patience) -> dict[str, Any]:
    """Ask; the result, whatever happened."""
    started, book = time.monotonic(), AnswerBook(job, claim.epoch)
    try:
        scores = asyncio.run(_ask_until_stopped(job, claim, book, patience))
        found: dict[str, Any] = {"status": "ok", "message": "", "scores": scores}
    except Stopped as error:
        found = {"status": "stopped", "message": str(error)}
    except Exception as error:
        traceback.print_exc()
        found = {"status": "failed", "class": _class_of(error), "message": str(error) or type(error).__name__}
    claim.flush()
    return {**found, "steps": len(book.answers), "seconds": round(time.monotonic() - started, 2)}


def _class_of(error: Exception) -> str:
    """`engine` and `crash` may go better another time, or in another pod."""
    if isinstance(error, EngineError | MissingPart):
        return "engine"
    return "bad_input" if isinstance(error, FtError) else "crash"


async def _ask_until_stopped(job: JobFolder, claim: Claim, book: AnswerBook, patience: Patience) -> Scores:
    asking = asyncio.create_task(_ask_all(job, claim, book, patience))
    saved = time.monotonic()
    try:
        while not (await asyncio.wait({asking}, timeout=LOOK_SECONDS))[0]:
            if reason := claim.stop_reason():
                raise Stopped(reason)
            if time.monotonic() - saved > SAVE_SECONDS:
                await asyncio.to_thread(book.save)
                saved = time.monotonic()
        return asking.result()
    finally:
        asking.cancel()
        await asyncio.wait({asking})
        book.save()


async def _ask_all(job: JobFolder, claim: Claim, book: AnswerBook, patience: Patience) -> Scores:
    """With the next engine where one dies; what it had answered is not asked again."""
    request = request_of(job)
    for deaths in range(1, ENGINE_DEATHS + 1):
        claim.report({"stage": "engine"})
        async with _engine(job, request) as engine:
            try:
                return await _ask_on(engine, job, claim, book, request, patience)
            except EngineError:
                if deaths == ENGINE_DEATHS or await engine.healthy():
                    raise
    raise AssertionError("unreachable")


@asynccontextmanager
async def _engine(job: JobFolder, request: EvalRequest) -> AsyncIterator[Engine]:
    """The vLLM that would serve: of the same version, with what the recipe says of serving."""
    spec, card = job.spec(), pick_card("auto")
    # There is no project here: of its paths only the cache matters.
    project = Project(root=job.path, home=job.path, cache=cache_folder())
    rank = engine_rank(max((subject.rank for subject in request.asked), default=0))
    serve = Finetune.model_validate(spec["recipe"]).serve
    # The card is the pod's, so the lock lies in the job: it keeps out a vLLM that an earlier evaluator left.
    # With the lock in the cache, `ft serve` held up the pods of `ft dev runpod`.
    lock = try_lock(replace(project, cache=job.path), card, f"evaluation of {job.path}")
    if lock is None:
        raise EngineError(f"an earlier evaluation's vLLM is still on card {card.name}", place=str(job.path),
                          fix="`ft resume` the run: another pod goes on")  # fmt: skip
    try:
        settings = Settings(**spec["engine"])
        vllm = await start_vllm(project, settings, EngineConfig(BaseModel(**spec["base"]), serve, card, rank), lock)
        try:
            yield vllm.engine
        finally:
            await asyncio.shield(vllm.stop())
    finally:
        lock.release()


async def _ask_on(
    engine: Engine, job: JobFolder, claim: Claim, book: AnswerBook, request: EvalRequest, patience: Patience
) -> Scores:
    rows, found = picked_rows(request), {}
    claim.report({"stage": "evaluate"})

    def progress(done: int, total: int) -> None:
        claim.report({"asked": done, "of": total})

    for at, subject in enumerate(request.asked):
        await _load(engine, job, subject)
        count = counted(progress, at * len(rows), len(request.asked) * len(rows))
        scored, answers = await score_subject(book.over(engine), request, subject, rows, count, patience)
        said = [each.as_dict() for each in answers]
        found[subject_key(request, subject, rows)] = {"scored": scored.as_dict(), "answers": said}
    return found


async def _load(engine: Engine, job: JobFolder, subject: Subject) -> None:
    if subject.folder:
        folder = job.path / subject.folder
        await asyncio.to_thread(admit, folder, subject.base, max(RANKS))
        await engine.load(subject.name, folder)


if __name__ == "__main__":
    main()

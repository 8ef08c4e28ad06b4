"""What a run tells MLflow, and what it does while MLflow is away: progress waits in the job's folder, steps wait."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from jobs.steps import Bench, State, Value
from registry import adapters
from registry.errors import FtError, StoreError, TrackerError
from registry.events import RUNS, append, by_run, new_event
from registry.job_folder import JobFolder
from registry.mlflow_mirror import mirror_model
from registry.mlflow_store import RunFacts, Tracked, Tracker, tracker_for
from registry.project import Project
from registry.recipe import Finetune
from registry.runs import Run, listed, mark_told, set_stage, untold
from registry.store import Store

TRACK_SECONDS = 3.0
PATIENCE_SECONDS = 120.0


async def keep_telling(bench: Bench, run_id: str, plan: State) -> None:
    """Send progress as it comes. A tracker that is down stops nothing: what is not sent stays in the folder."""
    begun: tuple[Tracker, Tracked] | None = None
    job = JobFolder(bench.project.job_folder(run_id))
    while True:
        await asyncio.sleep(TRACK_SECONDS)
        try:
            if begun is None:
                begun = await asyncio.to_thread(_begin, bench, run_id, plan)
            tracker, tracked = begun
            await asyncio.to_thread(tracker.send_progress, tracked, job)
        except (FtError, OSError) as error:
            begun = None  # where it was may be gone for good: `ft down` ends the server, and the file itself is used
            said = error.as_dict() if isinstance(error, FtError) else {"what": str(error)}
            away = new_event(RUNS, "run.tracker_away", run_id, said, key=f"{run_id}/away",
                             cause=by_run(run_id))  # fmt: skip
            with suppress(StoreError):
                await asyncio.to_thread(append, bench.store, away)


def tell_of_version(bench: Bench, run_id: str, plan: State, lineage: State) -> tuple[Tracked, int]:
    """All of the training to MLflow; the version's number is the one that MLflow gives."""
    job = JobFolder(bench.project.job_folder(run_id))
    tracker, tracked = _begin(bench, run_id, plan)
    tracker.send_progress(tracked, job)
    return tracked, tracker.register(tracked, bench.recipe(run_id).model, run_id, job.adapter, lineage)


async def patiently(bench: Bench, run_id: str, tell: Callable[[], Value]) -> Value:
    """Tell MLflow, again while it is away for a moment: one that is just restarted must not fail a night's run."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return await asyncio.to_thread(tell)
        except TrackerError:
            if time.monotonic() > deadline:
                raise
            set_stage(bench.store, run_id, "waiting for MLflow")
            await bench.outside("waiting", asyncio.sleep(TRACK_SECONDS))


def tell_the_rest(project: Project, store: Store) -> None:
    """What MLflow does not know yet of runs that ended badly, of aliases and of verdicts.

    Raises the last error after all were tried: one MLflow that is away must not keep another from being told.
    """
    moved = {model for model, _, _ in adapters.unprojected_aliases(store)}
    judged = {verdict.model for verdict in adapters.unprojected_verdicts(store)}
    models = [model for model in sorted(moved | judged) if _is_at_rest(store, model)]
    work: list[Callable[[], object]] = [partial(_tell_of_end, project, store, run) for run in untold(store)]
    work += [partial(mirror_model, project, store, model) for model in models]
    failed: Exception | None = None
    for tell in work:
        try:
            tell()
        except Exception as error:
            failed = error
    if failed:
        raise failed


def named_tracker(recipe: Finetune) -> bool:
    """Is an MLflow named, which all hosts reach? Otherwise it is a file of the project's folder."""
    return bool(recipe.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI"))


def _is_at_rest(store: Store, model: str) -> bool:
    """A run that is on tells of its version itself, at its end; two at once could cross."""
    return not any(run.model == model for run in listed(store, active=True, limit=1000))


def _tell_of_end(project: Project, store: Store, run: Run) -> None:
    recipe = Finetune.model_validate(run.body)
    tracker_for(project, recipe).end(recipe, run.id, "KILLED" if run.state == "cancelled" else "FAILED")
    mark_told(store, run)


def _begin(bench: Bench, run_id: str, plan: State) -> tuple[Tracker, Tracked]:
    recipe = bench.recipe(run_id)
    facts = RunFacts(run_id, recipe, bench.run(run_id).digest, plan["dataset"], plan["base"], plan["commit"])
    tracker = tracker_for(bench.project, recipe)
    return tracker, tracker.begin(facts)

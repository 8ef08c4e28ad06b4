"""What a run tells MLflow, and what it does while MLflow is away: progress waits in the job's folder, steps wait."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from jobs.steps import Bench, State, Value
from registry.errors import TrackerError
from registry.events import RUNS, append, by_run, new_event
from registry.job_folder import JobFolder
from registry.mlflow_store import RunFacts, Tracked, Tracker, tracker_for
from registry.project import Project
from registry.recipe import Finetune
from registry.runs import mark_told, set_stage, untold
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
        except TrackerError as error:
            away = new_event(RUNS, "run.tracker_away", run_id, error.as_dict(), key=f"{run_id}/away",
                             cause=by_run(run_id))  # fmt: skip
            append(bench.store, away)


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


def tell_of_ends(project: Project, store: Store) -> None:
    """Failed and cancelled runs end in MLflow too. Raises TrackerError; what it does not take now is told later."""
    for run in untold(store):
        recipe = Finetune.model_validate(run.body)
        tracker_for(project, recipe).end(recipe, run.id, "KILLED" if run.state == "cancelled" else "FAILED")
        mark_told(store, run)


def _begin(bench: Bench, run_id: str, plan: State) -> tuple[Tracker, Tracked]:
    recipe = bench.recipe(run_id)
    facts = RunFacts(run_id, recipe, bench.run(run_id).digest, plan["dataset"], plan["base"], plan["commit"])
    tracker = tracker_for(bench.project, recipe)
    return tracker, tracker.begin(facts)

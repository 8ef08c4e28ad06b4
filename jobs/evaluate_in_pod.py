"""A run's evaluation in a rented pod: a job in the run's folder, watched to its end; its scores are kept as others are.

Several in one run: the champion may change before the version is promoted, and then only the new one is asked.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

from jobs.evaluation.evaluate import EvalRequest, kept_scores, picked_rows, subject_key
from jobs.evaluation_job import is_whole, keys_asked, scores_in, write_evaluation
from jobs.steps import Bench, State
from jobs.target_of import evaluation_target
from jobs.targets.target import Poll, Target
from jobs.train_job import why_stopped
from registry import runs
from registry.base_models import BaseModel
from registry.errors import JobError
from registry.hosts import host_id
from registry.job_folder import JobFolder
from registry.scores import Scored, keep_score

WATCH_SECONDS = 0.3
AGAIN = ("crash", "engine")


async def evaluate_in_pod(bench: Bench, run_id: str, plan: State, request: EvalRequest) -> dict[str, Scored]:
    """Scores by role. Raises JobError, BudgetError, and what renting raises."""
    await asyncio.to_thread(runs.note_result, bench.store, run_id, rented_by=host_id())
    while len(found := await asyncio.to_thread(found_scores, bench, run_id, request)) < len(request.asked):
        job = await asyncio.to_thread(next_job, bench, run_id, plan, request, found)
        await _do(bench, run_id, plan, job)
    return {subject.role: found[subject.role] for subject in request.asked}


def found_scores(bench: Bench, run_id: str, request: EvalRequest) -> dict[str, Scored]:
    """By role: what is kept, and what this run's evaluations have found, which is kept now."""
    there: dict[str, Any] = {}
    for job in JobFolder(bench.project.job_folder(run_id)).evaluations():
        there |= scores_in(job)
    rows, found = picked_rows(request), kept_scores(bench.store, request)
    for subject in request.asked:
        key = subject_key(request, subject, rows)
        if subject.role in found or key not in there:
            continue
        scored = Scored.from_dict(there[key]["scored"])
        if not scored.failed:  # an answer that failed once may come next time
            keep_score(bench.store, key, scored, there[key]["answers"])
        found[subject.role] = replace(scored, subject=subject.name, version=subject.version)
    return found


def next_job(bench: Bench, run_id: str, plan: State, request: EvalRequest, found: dict[str, Scored]) -> JobFolder:
    """The evaluation that was begun, or the next."""
    begun = [
        job for job in JobFolder(bench.project.job_folder(run_id)).evaluations() if not scores_in(job) and is_whole(job)
    ]
    if begun:
        return begun[-1]
    asked = [subject for subject in request.asked if subject.role not in found]
    recipe, base = bench.recipe(run_id), BaseModel(**plan["base"])
    return write_evaluation(bench.project, bench.settings, run_id, recipe, base, request, asked)


async def _do(bench: Bench, run_id: str, plan: State, job: JobFolder) -> None:
    """Have the job done. A step that is cancelled leaves no pod behind."""
    recipe = bench.recipe(run_id)
    target = evaluation_target(bench.project, bench.store, bench.settings, recipe, plan, run_id)
    try:
        await _until_done(bench, run_id, job, target)
    except asyncio.CancelledError:
        await asyncio.shield(asyncio.to_thread(target.cancel, job.path, why_stopped(bench.store, run_id)))
        raise
    if missing := keys_asked(job) - set(scores_in(job)):
        raise JobError(
            f"{len(missing)} of the scores that were asked for did not come: the pod's ft is not this one",
            place=str(job.path), fix=f"build and push the image again (docs/cloud.md), then `ft resume {run_id}`",
        )  # fmt: skip


async def _until_done(bench: Bench, run_id: str, job: JobFolder, target: Target) -> None:
    """Pods that die are followed by others, which ask only what was not answered yet."""
    retries, lost, failed, further = bench.recipe(run_id).retries, 0, 0, 0
    job.withdraw_stop()  # of a worker that was killed while it stopped a pod
    while True:
        poll = await asyncio.to_thread(target.poll, job.path)
        if poll.result and poll.result["status"] == "ok":
            return
        if poll.state == "done" and _is_new(bench, job):
            failed += 1
            _refuse_for_good(run_id, job, poll, failed > retries.crash)
        elif poll.state == "lost":
            before, further = further, len(job.progress_files())
            lost = lost + 1 if further == before else 0
            _refuse_lost(run_id, job, poll, lost, retries.lost)
        if poll.state != "running":
            await asyncio.to_thread(target.launch, job.path)
        runs.set_stage(bench.store, run_id, _stage(job, target))
        await bench.outside("evaluation", asyncio.sleep(WATCH_SECONDS))


def _is_new(bench: Bench, job: JobFolder) -> bool:
    """Of this attempt of the step; a run that is resumed goes on behind an older one."""
    return (job.path / "result.json").stat().st_mtime >= bench.started


def _refuse_for_good(run_id: str, job: JobFolder, poll: Poll, often: bool) -> None:
    result = poll.result or {}
    kind = str(result.get("class") or result["status"])
    if kind in AGAIN and not often:
        return
    more = " with more budget (`budgets.run_usd` in ft.yaml)" if kind == "stopped" else ""
    raise JobError(f"the evaluation failed ({kind}): {result.get('message')}", place=str(job.log),
                   fix=f"`ft resume {run_id}`{more} asks only what was not answered yet")  # fmt: skip


def _refuse_lost(run_id: str, job: JobFolder, poll: Poll, lost: int, most: int) -> None:
    if lost > most:
        raise JobError(f"the evaluation was lost {lost} times: {poll.note}", place=str(job.log),
                       fix=f"read it with `ft logs {run_id}`, then `ft resume {run_id}`")  # fmt: skip


def _stage(job: JobFolder, target: Target) -> str:
    """`evaluate 12/300`, which the bar shows; before that what it waits for."""
    told: dict[str, Any] = {}
    for file in job.progress_files()[-2:]:
        for line in file.read_text(encoding="utf-8").splitlines():
            told |= json.loads(line)
    if "asked" in told:
        return f"evaluate {told['asked']}/{told['of']}"
    if told.get("stage") == "engine":
        return "evaluate: starting the engine in the pod"
    return f"evaluate: {target.waits_for(job.path)}"

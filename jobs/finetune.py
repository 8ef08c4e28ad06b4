"""THE workflow: a recipe becomes a judged, versioned, served adapter.

Reads from top to bottom as the run goes. Every step is at least once, so each finds what an earlier attempt left:
the job folder, the MLflow run and version (by our run's id), the scores (by content), the promotion (by run id).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from typing import Any

from dbos import DBOS, SetWorkflowID

from jobs.approval import wait_for_approval
from jobs.escalation import escalate
from jobs.evaluate_in_pod import evaluate_in_pod
from jobs.evaluation.ask_on_engine import ask_on_engine
from jobs.evaluation.evaluate import EvalRequest, kept_scores
from jobs.fetch_base import fetch_base
from jobs.outages import through_outage
from jobs.place import place, write_job
from jobs.roll_out import behind_others, goes_by_steps, roll_out
from jobs.runtime import card_queue
from jobs.served import take_back, what_server_said
from jobs.steps import BENCH, Bench, State, step
from jobs.targets.local_card import LocalCard
from jobs.tell_mlflow import patiently, tell_of_version
from jobs.through_bucket import bring_adapter, bring_for_evaluation, lends, look_back, send_job, share_adapters, way_to
from jobs.train_job import measure, train_job
from registry import adapters, runs
from registry.admission import admit
from registry.base_models import BaseModel, refuse_use
from registry.cards import pick_card
from registry.dataset_versions import Pinned, pin
from registry.errors import Conflict, EngineError, FtError, Trouble
from registry.gates import judge as judge_scores
from registry.job_folder import JobFolder
from registry.mlflow_mirror import mirror
from registry.mlflow_store import Tracked, git_commit, tracker_for
from registry.project import Project
from registry.recipe import Finetune
from registry.settings import Settings
from registry.store import Store
from serving.control import server_status

MAX_LORA_RANK = 64
WATCH_SECONDS = 0.3
SERVED_SECONDS = 300.0


@DBOS.workflow(name="finetune")
async def finetune(run_id: str) -> State:
    """pin -> plan -> train on a card -> register -> evaluate where it will serve -> judge (-> approval) -> promote.

    What is not promoted may lead to another recipe (`escalate`).
    """
    try:
        await take_turn(run_id)
        plan = await make_plan(run_id, await pin_data(run_id))
        trained = await _child(None if plan.get("rent") else _queue(plan), train_on_card, run_id, plan)
        version = await register(run_id, plan, trained)
        verdict, moved = await _judge_and_promote(run_id, plan, version)
        if moved:
            await wait_until_served(run_id, moved)
        elif plan.get("escalate"):  # a plan that an older ft made has none
            await escalate(run_id, plan, verdict)
        return await conclude(run_id, verdict)
    except Exception as error:
        await through_outage(_note_failure, run_id, error)
        raise


@DBOS.workflow(name="train_on_card")
async def train_on_card(run_id: str, plan: State) -> State:
    return await train(run_id, plan)


@DBOS.workflow(name="evaluate_on_card")
async def evaluate_on_card(run_id: str, plan: State, version: State) -> State:
    return await ask_all(run_id, plan, version)


async def _judge_and_promote(run_id: str, plan: State, version: State) -> tuple[State, State | None]:
    """The verdict that stands, and the move of `champion` if there was one.

    What passed against a champion that was replaced meanwhile is judged again, and asked for again.
    """
    while True:
        asked = await share(run_id, version) if _on_lent_card(plan) else version
        scores = await _child(_evaluation_queue(plan), evaluate_on_card, run_id, plan, asked)
        verdict = await judge(run_id, version, scores)
        if verdict["outcome"] == "pass" and plan["promote"] == "approve":
            verdict = await wait_for_approval(run_id, verdict)
        if verdict["outcome"] != "pass" or plan["promote"] == "manual":
            return verdict, None
        moved = await promote(run_id, verdict)
        if "by_steps" in moved:
            moved = await roll_out(run_id, verdict)
        if "ended" in moved:
            return {**verdict, "outcome": moved["ended"]}, None
        if "judge_again" not in moved:
            return verdict, moved


@step("take turn")
async def take_turn(bench: Bench, run_id: str) -> State:
    """Wait for earlier runs of the same recipe."""
    while ahead := runs.earlier_active(bench.store, bench.run(run_id)):
        runs.set_stage(bench.store, run_id, f"waiting behind {ahead[-1]}")
        await bench.outside("waiting", asyncio.sleep(WATCH_SECONDS))
    return {}


@step("pin")
async def pin_data(bench: Bench, run_id: str) -> State:
    """The dataset's version as it is now; a `plan` that is repeated must find the one that it wrote down."""
    return asdict(await asyncio.to_thread(pin, bench.project, bench.recipe(run_id).data.path))


@step("plan")
async def make_plan(bench: Bench, run_id: str, dataset: State) -> State:
    """Get the base model, choose the card or what is rented, write the job's folder."""
    recipe, pinned = bench.recipe(run_id), Pinned(**dataset)
    refuse_use(recipe.use, recipe.base.model, recipe.base.licence or "")
    fetching = asyncio.to_thread(fetch_base, bench.project, recipe.base)
    base: BaseModel = await bench.outside("set-up", fetching)
    refuse_use(recipe.use, base.source, base.licence)
    placed = await asyncio.to_thread(place, bench.project, bench.store, bench.settings, recipe, run_id)
    way = way_to(bench, run_id, placed.card)
    await asyncio.to_thread(look_back, bench, run_id)
    await asyncio.to_thread(write_job, bench.project, run_id, recipe, placed, base, pinned)
    if way["through"]:
        await bench.outside("set-up", asyncio.to_thread(send_job, bench, run_id, recipe, base.as_dict()))
    shown = {name: dataset[name] for name in ("path", "hash", "rows")}
    runs.note_result(bench.store, run_id, dataset=shown, base=base.as_dict(), card=placed.card.card.name,
                     host=placed.card.host, rent=placed.rent, plan=placed.expected, evaluate_on=placed.evaluated_on,
                     rent_to_evaluate=placed.rent_to_evaluate, **way)  # fmt: skip
    return {
        "dataset": dataset,
        "base": base.as_dict(),
        "card": placed.card.card.name,
        "host": placed.card.host,
        "rent": placed.rent,
        "evaluate_on": placed.evaluated_on,
        "rent_to_evaluate": placed.rent_to_evaluate,
        **way,
        "planned": placed.judged is not None,
        "promote": recipe.promote,
        "escalate": recipe.escalate and ("approve" if recipe.escalate.approve else "auto"),
        "commit": git_commit(bench.project.root),
    }


@step("train")
async def train(bench: Bench, run_id: str, plan: State) -> State:
    """Have a trainer do the job on the card or pod; started again if it is lost, from its last checkpoint."""
    result = await train_job(bench, run_id, plan)
    runs.note_result(bench.store, run_id, training=result)
    return result


@step("register")
async def register(bench: Bench, run_id: str, plan: State, trained: State) -> State:
    """Admit the adapter, register it in MLflow, and put it into its immutable folder."""
    recipe, base = bench.recipe(run_id), BaseModel(**plan["base"])
    job = JobFolder(bench.project.job_folder(run_id))
    if plan.get("through"):
        await bench.outside("set-up", asyncio.to_thread(bring_adapter, bench, run_id))
        await asyncio.to_thread(measure, bench, run_id, plan, trained)
    facts = await asyncio.to_thread(admit, job.adapter, base.digest, MAX_LORA_RANK)
    lineage = {
        "base": base.source,
        "base_revision": base.revision,
        "base_digest": base.digest,
        "licence": base.licence,
        "dataset": plan["dataset"]["path"],
        "dataset_hash": plan["dataset"]["hash"],
        "recipe": recipe.name,
        "recipe_digest": bench.run(run_id).digest,
        "commit": plan["commit"],
        "rank": facts["rank"],
    }
    tracked, number = await patiently(bench, run_id, lambda: tell_of_version(bench, run_id, plan, lineage))
    folder = bench.project.adapter_folder(recipe.model, number)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # The card may be another host's; to fetch needs none of it.
    await asyncio.to_thread(LocalCard(bench.project, pick_card("cpu")).fetch, job.path, folder)
    body = {
        **lineage,
        "base": base.as_dict(),
        "dataset": plan["dataset"],
        "recipe": recipe.model_dump(mode="json"),
        "admission": facts,
        "training": trained,
        "mlflow": asdict(tracked),
    }
    relative = str(folder.relative_to(bench.project.home))
    adapters.add_version(bench.store, recipe.model, number, run_id, relative, body)
    runs.note_result(bench.store, run_id, version=number)
    return {"model": recipe.model, "version": number}


@step("share")
async def share(bench: Bench, run_id: str, version: State) -> State:
    """Put what is to be compared where a host without this folder can get it."""
    return await bench.outside("set-up", asyncio.to_thread(share_adapters, bench, version))


@step("evaluate")
async def ask_all(bench: Bench, run_id: str, plan: State, version: State) -> State:
    """Candidate, champion and base answer the test split on the engine that will serve, or its like in a pod."""
    recipe, base = bench.recipe(run_id), BaseModel(**plan["base"])
    if lends(bench):
        await bench.outside("set-up", asyncio.to_thread(bring_for_evaluation, bench, run_id, version))
    # If the champion is another by now, the promotion finds out, and it is all judged again.
    named = version if "champion" in version else adapters.aliases(bench.store, version["model"])
    champion = named.get("champion")
    request = EvalRequest.for_version(
        bench.project, bench.store, recipe, base, plan["dataset"], bench.project.job_folder(run_id) / "data",
        candidate=version["version"], champion=champion,
    )  # fmt: skip
    scored = kept_scores(bench.store, request)
    if len(scored) < len(request.asked) and plan.get("rent_to_evaluate"):
        scored = await evaluate_in_pod(bench, run_id, plan, request)
    elif len(scored) < len(request.asked):
        if not lends(bench):
            await _base_here(bench, recipe)
        scored = await ask_on_engine(bench, run_id, request, pick_card(_evaluating_card(plan)), base)
    return {"scores": {name: each.as_dict() for name, each in scored.items()}}


@step("judge")
async def judge(bench: Bench, run_id: str, version: State, scores: State) -> State:
    """What the gate says, written down beside the version."""
    recipe = bench.recipe(run_id)
    judged = judge_scores(recipe.gate, recipe.evaluate.task, *EvalRequest.subjects(scores))
    verdict = adapters.add_verdict(
        bench.store, version["model"], version["version"], judged.outcome, judged.body, run_id
    )
    runs.note_result(bench.store, run_id, verdict=judged.outcome, checks=judged.body["checks"],
                     scores=_of_each(scores, "metrics"), probes=_of_each(scores, "probes"))  # fmt: skip
    return {"id": verdict.id, "outcome": verdict.outcome, **version}


@step("promote")
async def promote(bench: Bench, run_id: str, verdict: State) -> State:
    """Move `champion`, if it still is what the verdict was made against; `by_steps` if the recipe wants that."""
    await behind_others(bench, run_id, verdict["model"])
    judged = adapters.last_verdict(bench.store, verdict["model"], verdict["version"])
    assert judged is not None
    if goes_by_steps(bench, run_id, judged):
        return {"by_steps": True}
    by, reason = verdict.get("by") or "ft", verdict.get("reason") or "the gate passed it"
    try:
        done = adapters.promote(bench.store, judged, by_whom=by, run_id=run_id, reason=reason)
    except Conflict as error:
        champion = adapters.aliases(bench.store, judged.model).get("champion")
        if champion == judged.version:  # a person was faster
            done = adapters.promotions(bench.store, judged.model)[-1]
        elif champion != judged.body.get("champion"):
            return {"judge_again": error.what}
        else:
            raise
    runs.note_result(bench.store, run_id, promoted={"from": done.from_version, "to": done.version})
    return {"model": done.model, "version": done.version, "from": done.from_version}


@step("wait until served")
async def wait_until_served(bench: Bench, run_id: str, moved: State) -> State:
    """If a server is up for this base, wait for its swap; a version that it refuses goes back by itself."""
    subject = f"{moved['model']}@{moved['version']}"
    base = adapters.get_version(bench.store, moved["model"], moved["version"]).body["base"]["digest"]
    deadline = time.monotonic() + SERVED_SECONDS
    while time.monotonic() < deadline:
        answer = what_server_said(bench, subject)
        if answer and answer["type"] == "adapter.served":
            runs.note_result(bench.store, run_id, served=answer["data"])
            return {"served": True}
        if answer:
            take_back(bench, run_id, moved, answer["data"])
        status = await asyncio.to_thread(server_status, bench.store)
        engine = status.engine_on(base) if status is not None else None
        if engine is None or engine.is_off:
            runs.note_result(bench.store, run_id, served=None)
            return {"served": False}
        if "card" in engine.state:  # another run trains on it: that may take hours, and the swap comes after
            deadline = time.monotonic() + SERVED_SECONDS
        await bench.outside("engine" if engine.state != "serving" else "swap", asyncio.sleep(WATCH_SECONDS))
    raise EngineError(f"{subject} was promoted, but is not served after {SERVED_SECONDS:.0f} s",
                      fix="look at `ft serve status`, then `ft resume` the run or `ft rollback`")  # fmt: skip


@step("conclude")
async def conclude(bench: Bench, run_id: str, verdict: State) -> State:
    """Tell MLflow the rest, and end the run. What MLflow cannot take now is taken from our store later."""
    recipe, body = bench.recipe(run_id), adapters.version_of_run(bench.store, run_id).body
    tracker, tracked = tracker_for(bench.project, recipe), Tracked(**body["mlflow"])

    def tell() -> None:
        tracker.log_scores(tracked, bench.run(run_id).result["scores"])
        mirror(bench.store, tracker, recipe.model)
        tracker.end(recipe, run_id, "FINISHED")

    await patiently(bench, run_id, tell)
    outcome: runs.State = "succeeded" if verdict["outcome"] == "pass" else "refused"
    runs.finish(bench.store, run_id, outcome)
    return {"outcome": outcome}


def begin(run_id: str) -> None:
    """Start the run's workflow in this process, at once; a second start of the same run does nothing."""
    with SetWorkflowID(run_id):
        DBOS.start_workflow(finetune, run_id)


async def _base_here(bench: Bench, recipe: Finetune) -> None:
    """The base model may have been fetched by another host, into that host's cache."""
    await bench.outside("set-up", asyncio.to_thread(fetch_base, bench.project, recipe.base))


async def _child(
    queue: str | None, workflow: Callable[..., Coroutine[Any, Any, State]], run_id: str, *rest: State
) -> State:
    """Run a child on a card's queue, where one works at a time, or at once. What went wrong is in the run's row."""
    handle: Any
    if queue:
        handle = await DBOS.enqueue_workflow_async(queue, workflow, run_id, *rest)
    else:
        handle = await DBOS.start_workflow_async(workflow, run_id, *rest)
    return dict(await handle.get_result(polling_interval_sec=WATCH_SECONDS))


def _queue(plan: State) -> str:
    return card_queue(plan["card"], plan.get("host", ""))


def _on_lent_card(plan: State) -> bool:
    return bool(plan.get("through")) and not plan.get("rent_to_evaluate")


def _evaluating_card(plan: State) -> str:
    return str(plan.get("evaluate_on") or plan["card"])


def _evaluation_queue(plan: State) -> str | None:
    return None if plan.get("rent_to_evaluate") else card_queue(_evaluating_card(plan), plan.get("host", ""))


def _of_each(scores: State, field: str) -> State:
    return {name: each[field] for name, each in scores["scores"].items()}


def _note_failure(run_id: str, error: Exception) -> None:
    known = error if isinstance(error, FtError) else Trouble(f"{type(error).__name__}: {error}", place=run_id)
    store = BENCH.get().store
    # The end of a cancelled child is no failure; and one that `ft resume` has reopened since its child failed goes on.
    if runs.get(store, run_id).wish not in (*runs.STOPS, "replan", "resume"):
        # A child's error reaches the parent as text only; what the step itself wrote down is kept.
        runs.finish(store, run_id, "failed", known)


def bind(project: Project, store: Store, settings: Settings) -> None:
    """Give the steps of this process their project, store and settings."""
    BENCH.set(Bench(project, store, settings))

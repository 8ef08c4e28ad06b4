"""A run whose version is not good enough: another recipe of the same model is started, after a person's yes if wanted.

Nothing that goes wrong here fails the run, whose version is judged already: the escalation is then undecided.
"""

from __future__ import annotations

from jobs.approval import until_answered
from jobs.evaluation.ask_provider import score_reference
from jobs.evaluation.evaluate import EvalRequest
from jobs.steps import Bench, State, step
from registry import adapters, approvals, escalation, runs
from registry.base_models import BaseModel
from registry.charges import Payer
from registry.cloud_terms import Escalation, ReferenceModel
from registry.durations import seconds
from registry.errors import FtError, StoreError
from registry.recipe import Recipe
from registry.scores import Scored, metric_for


async def escalate(run_id: str, plan: State, verdict: State) -> State:
    """Compare, ask a person if the recipe says so, start. For a version that was not promoted."""
    found = await compare(run_id, plan, verdict)
    if found["outcome"] == "wanted" and plan["escalate"] == "approve":
        found = await wait_for_yes(run_id, found)
    if found["outcome"] == "wanted":
        found = await start_other(run_id, found)
    return found


@step("escalate")
async def compare(bench: Bench, run_id: str, plan: State, verdict: State) -> State:
    """Is the version's score below the condition's limit? A reference that is a model is asked for its own."""
    try:
        found = await _compared(bench, run_id, plan, verdict)
    except StoreError:  # the step is done again when the store is back
        raise
    except FtError as error:
        found = _undecided(bench, run_id, error)
    return _noted(bench, run_id, found)


@step("waiting for approval to escalate")
async def wait_for_yes(bench: Bench, run_id: str, found: State) -> State:
    """Until somebody answers or the time is over, as with a promotion."""
    limit = seconds(_terms(bench, run_id).timeout)
    asked = {name: found[name] for name in ("to", "score", "limit", "max_usd")}
    asking = approvals.ask(bench.store, run_id, found["verdict"], found["model"], found["version"], seconds=limit,
                           escalation=asked)  # fmt: skip
    asking = await until_answered(bench, asking, limit)
    outcome = "wanted" if asking.answer == "approved" else asking.answer
    said = {"by": asking.by_whom, "reason": asking.reason, "at": asking.answered}
    return _noted(bench, run_id, {**found, **said, "outcome": outcome})


@step("start escalation")
async def start_other(bench: Bench, run_id: str, found: State) -> State:
    """Submit the other recipe's run, once. What a person has promoted meanwhile needs none."""
    started = escalation.started_by(bench.store, run_id)
    if started:
        return _noted(bench, run_id, {**found, "outcome": "started", "run": started})
    if adapters.aliases(bench.store, found["model"]).get("champion") == found["version"]:
        return _noted(bench, run_id, {**found, "outcome": "promoted"})
    try:
        other = _other(bench, run_id, found["max_usd"])
    except StoreError:
        raise
    except FtError as error:
        return _noted(bench, run_id, _undecided(bench, run_id, error))
    started = escalation.start(bench.store, run_id, other, found["to"], found)
    return _noted(bench, run_id, {**found, "outcome": "started", "run": started})


async def _compared(bench: Bench, run_id: str, plan: State, verdict: State) -> State:
    recipe, terms = bench.recipe(run_id), _terms(bench, run_id)
    other = _other(bench, run_id, terms.max_usd)  # before a provider is paid for answers
    metric = metric_for(recipe.evaluate.task, recipe.gate.metric)
    score = bench.run(run_id).result["scores"]["candidate"][metric]
    number, asked = terms.reference if isinstance(terms.reference, float) else None, None
    if model := escalation.model_to_ask(terms):
        asked = await bench.outside("reference", _ask(bench, run_id, plan, model))
        number = asked.metrics[metric]
    return {
        "outcome": "wanted" if escalation.decide(terms.when, score, number) else "not needed",
        "to": terms.to, "max_usd": other.budget.max_usd, "metric": metric, "score": score,
        "limit": escalation.limit_of(terms.when, number), "reference": number,
        "reference_model": asked.subject if asked else None, "unanswered": len(asked.failed) if asked else 0,
        "verdict": verdict["id"], "model": verdict["model"], "version": verdict["version"],
    }  # fmt: skip


async def _ask(bench: Bench, run_id: str, plan: State, model: ReferenceModel) -> Scored:
    def progress(done: int, total: int) -> None:
        runs.set_stage(bench.store, run_id, f"asking {model.model} {done}/{total}")

    data = bench.project.job_folder(run_id) / "data"
    base, dataset = BaseModel(**plan["base"]), plan["dataset"]["hash"]
    recipe = bench.recipe(run_id)
    request = EvalRequest.made(recipe, base, dataset, data, [])
    payer = Payer(bench.store, run_id, recipe.name, bench.settings.budgets, recipe.budget.max_usd)
    return await score_reference(payer, model, request, progress)


def _other(bench: Bench, run_id: str, max_usd: float) -> Recipe:
    """The recipe to start, within its budget. Raises RecipeError if it cannot be, or led to this run."""
    recipe, place = bench.recipe(run_id), bench.run(run_id).recipe_path
    escalation.check_escalation(bench.project.root, recipe, place)
    other = escalation.other_recipe(bench.project.root, recipe, place)
    escalation.refuse_circle(bench.store, run_id, other)
    return escalation.bounded(other, max_usd, bench.settings.budgets.run_usd)


def _terms(bench: Bench, run_id: str) -> Escalation:
    terms = bench.recipe(run_id).escalate
    assert terms is not None
    return terms


def _undecided(bench: Bench, run_id: str, error: FtError) -> State:
    return {"outcome": "undecided", "to": _terms(bench, run_id).to, "why": str(error)}


def _noted(bench: Bench, run_id: str, found: State) -> State:
    runs.note_result(bench.store, run_id, escalated=found)
    return found

"""Where a run goes: the plan of its training on every card that it may have, and what is rented if ours will not do.

Used by the step "plan", and before that by `ft run`, so that nobody is surprised by what money is spent on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jobs.rent import Offer
from jobs.token_histogram import look
from registry.base_models import BaseModel
from registry.budgets import run_cap
from registry.candidates import Around, Candidate, Judged, choose, judge, look_around, rentable, wish_of
from registry.dataset_versions import Pinned, materialise
from registry.errors import BudgetError
from registry.hosts import HostCard, choose_card, is_named
from registry.job_folder import JobFolder
from registry.plan import Wish, arrangements
from registry.plan_evaluation import EvaluationPlan, plan_evaluation
from registry.project import Project
from registry.recipe import Finetune
from registry.settings import Settings
from registry.store import Store
from registry.train_time import Interval

# RunPod is asked for one card after the other; a long list would only hide that nothing is free.
MOST_OFFERS = 6
# Of what the plan says at most: what it cannot know of is an image that comes slowly.
RESERVED = 1.2


@dataclass(frozen=True)
class Placed:
    """`card` is where the version is trained unless something is rented, and evaluated, unless that is rented too; it
    has no `judged` where there was nothing to choose. `rent`, `rent_to_evaluate`: offers by price and what to reserve
    for a pod, for `jobs/target_of.py`."""

    card: HostCard
    batch: int
    accumulate: int
    judged: Judged | None = None
    wish: Wish | None = None
    rent: dict[str, Any] | None = None
    rent_to_evaluate: dict[str, Any] | None = None
    evaluated_on: str = ""  # the card's name, or runpod

    @property
    def expected(self) -> dict[str, Any] | None:
        """What the plan says, as a run's result keeps it."""
        if self.judged is None:
            return None
        told = self.judged.as_dict()
        kept = ("name", "title", "batch", "accumulate", "steps", "tokens", "seconds", "usd", "limit", "fits", "tight")
        return {**{name: told[name] for name in kept}, "memory": self.judged.verdict.memory.total}


def place(project: Project, store: Store, settings: Settings, recipe: Finetune, run_id: str = "") -> Placed:
    """Raises DoesNotFit, BudgetError, WrongInput (no such card), and what a look at base and data raises."""
    around = look_around(store, settings, prices=recipe.cloud is not None, besides=run_id)
    if recipe.card not in ("auto", "runpod"):
        _card(recipe.card, around)  # says why one that is there cannot be had
    if not _has_choice(recipe, around):
        card = _card(recipe.card, around)
        return Placed(card, *arrangements(recipe.train)[-1], evaluated_on=card.card.name)
    looked = look(project, recipe, python=settings.trainer_python)
    wish = wish_of(recipe, looked.histogram, looked.config)
    judged = judge(recipe, wish, around)
    chosen = choose(recipe, judged)
    evaluation = plan_evaluation(recipe, wish, looked.histogram, judged, chosen)
    card = _card_for(chosen, evaluation, around)
    rent, rent_to_evaluate = rented(recipe, settings, judged, chosen, evaluation)
    on = _evaluating_card(card, evaluation, around)
    return Placed(card, chosen.verdict.batch, chosen.verdict.accumulate, chosen, wish, rent, rent_to_evaluate, on)


def _card_for(chosen: Judged, evaluation: EvaluationPlan, around: Around) -> HostCard:
    """The card that trains; of a run that is trained in a pod the one that evaluates, if one can."""
    if chosen.candidate.kind == "card":
        return _card(chosen.candidate.name, around)
    able = [each for each in around.cards if each.name in evaluation.cards]
    return _card("auto", around, able or around.cards)


def _evaluating_card(card: HostCard, evaluation: EvaluationPlan, around: Around) -> str:
    """The card of the run if it can, else another one of its host that can."""
    if evaluation.rented:
        return "runpod"
    able = [each for each in around.cards if each.name in evaluation.cards]
    if not able or card.name in evaluation.cards:
        return card.card.name
    return _card("auto", around, able).card.name


def _card(wanted: str, around: Around, among: Sequence[HostCard] | None = None) -> HostCard:
    there = list(around.cards if among is None else among)
    return choose_card(wanted, there, around.paused, dict(around.busy), around.cut)


def _has_choice(recipe: Finetune, around: Around) -> bool:
    """A plan counts the tokens of the whole dataset. Where there is one CPU and nothing to decide, it is not made."""
    own = [each for each in around.cards if is_named(each, recipe.card)]
    only_cpu = all(each.card.is_cpu for each in own)
    return recipe.cloud is not None or recipe.train.batch == "auto" or not only_cpu


def rented(
    recipe: Finetune, settings: Settings, judged: list[Judged], chosen: Judged, evaluation: EvaluationPlan
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """What is rented to train and to evaluate; of the run's budget the second is held back from the first.

    Raises BudgetError if the run's budget does not pay for the least that both are expected to cost.
    """
    trains = chosen.verdict.usd if chosen.candidate.kind == "runpod" else None
    evaluates = evaluation.rented[0].usd if evaluation.rented else None
    if trains is None and evaluates is None:
        return None, None
    cap = run_cap(recipe.budget.max_usd, settings.budgets, recipe.name)
    nothing = Interval(0, 0, 0)
    _refuse_too_dear(cap, chosen, trains or nothing, evaluation, evaluates or nothing)
    rent = _rent(judged, chosen) if trains else None
    if evaluates is None:
        return rent, None
    to_evaluate = _rent_to_evaluate(evaluation)
    left = cap - (rent["reserve_usd"] if rent else 0.0)
    held = min(to_evaluate["reserve_usd"], max(evaluates.low, left))
    return rent and {**rent, "max_usd": round(cap - held, 6)}, to_evaluate


def _refuse_too_dear(
    cap: float, chosen: Judged, trains: Interval, evaluation: EvaluationPlan, evaluates: Interval
) -> None:
    expected = trains + evaluates
    if expected.low <= cap:
        return
    on = [chosen.candidate.name] if trains.high else []
    on += [f"{evaluation.rented[0].candidate.name} for the evaluation"] if evaluates.high else []
    raise BudgetError(
        f"${expected.low:.2f} to ${expected.high:.2f} are expected on {' and '.join(on)}, and ${cap:.2f} is "
        "what the run may cost", place="budget of the run",
        fix="raise `budget.max_usd` in the recipe, train on fewer rows, or name other `cloud.gpus`; `ft plan` "
        "shows all",
    )  # fmt: skip


def _rent(judged: list[Judged], chosen: Judged) -> dict[str, Any]:
    """Only cards on which the chosen batch fits: a job's batch is settled before its pod is."""
    offered = [each for each in rentable(judged) if each.verdict.batch >= chosen.verdict.batch][:MOST_OFFERS]
    return _offers([(each.candidate, each.verdict.usd) for each in offered])


def _rent_to_evaluate(evaluation: EvaluationPlan) -> dict[str, Any]:
    best, offered = evaluation.rented[0], evaluation.rented[:MOST_OFFERS]
    return {**_offers([(each.candidate, each.usd) for each in offered]), "expected": best.as_dict()}


def _offers(found: list[tuple[Candidate, Interval | None]]) -> dict[str, Any]:
    dearest = max(usd.high for _, usd in found if usd)
    return {"offers": [asdict(_offer(each)) for each, _ in found], "reserve_usd": round(dearest * RESERVED, 4)}


def _offer(here: Candidate) -> Offer:
    assert here.place.usd_per_hour is not None
    return Offer(here.gpu, here.cloud, here.place.usd_per_hour)


def write_job(project: Project, run_id: str, recipe: Finetune, placed: Placed, base: BaseModel, pinned: Pinned) -> None:
    """The job's folder. One that is planned again, elsewhere, keeps its spec: what differs is another attempt."""
    job = JobFolder(project.job_folder(run_id))
    batch = {"batch": placed.batch, "accumulate": placed.accumulate, "effective_batch": None}
    body = recipe.model_dump(mode="json")
    spec = {"job": run_id, "recipe": {**body, "train": {**body["train"], **batch}}, "base": base.as_dict(),
            "dataset": pinned.hash}  # fmt: skip
    if recipe.train.batch == "auto" and (job.path / "spec.json").exists():
        _change_batch(job, placed)
    else:
        job.write_spec(spec)
    materialise(project, pinned, job.data)


def _change_batch(job: JobFolder, placed: Placed) -> None:
    """The rows of one update stay as they are, so the checkpoints do as well."""
    now = job.recipe()["train"]
    if (now["batch"], now["accumulate"]) != (placed.batch, placed.accumulate):
        held = job.lease()
        change = {"batch": placed.batch, "accumulate": placed.accumulate}
        job.add_attempt(
            {"after": held.lease.epoch if held else 0, "class": "replanned", "train": change, "anew": False}
        )

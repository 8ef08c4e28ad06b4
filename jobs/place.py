"""Where a run goes: the plan of its training on every card that it may have, and what is rented if ours will not do.

Used by the step "plan", and before that by `ft run`, so that nobody is surprised by what money is spent on.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from jobs.rent import Offer
from jobs.token_histogram import look
from registry.base_models import BaseModel
from registry.budgets import run_cap
from registry.candidates import Around, Judged, choose, judge, look_around, rentable, wish_of
from registry.dataset_versions import Pinned, materialise
from registry.errors import BudgetError
from registry.hosts import HostCard, choose_card, is_named
from registry.job_folder import JobFolder
from registry.plan import Wish, arrangements
from registry.project import Project
from registry.recipe import Finetune
from registry.settings import Settings
from registry.store import Store

# RunPod is asked for one card after the other; a long list would only hide that nothing is free.
MOST_OFFERS = 6
# Of what the plan says at most: what it cannot know of is an image that comes slowly.
RESERVED = 1.2


@dataclass(frozen=True)
class Placed:
    """`card` is where the version is evaluated, and trained unless something is rented; it has no `judged` where
    there was nothing to choose. `rent`: offers by price and what to reserve for a pod, for `jobs/target_of.py`."""

    card: HostCard
    batch: int
    accumulate: int
    judged: Judged | None = None
    wish: Wish | None = None
    rent: dict[str, Any] | None = None

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
        return Placed(_card(recipe.card, around), *arrangements(recipe.train)[-1])
    looked = look(project, recipe, python=settings.trainer_python)
    wish = wish_of(recipe, looked.histogram, looked.config)
    judged = judge(recipe, wish, around)
    chosen = choose(recipe, judged)
    verdict = chosen.verdict
    if chosen.candidate.kind == "card":
        return Placed(_card(chosen.candidate.name, around), verdict.batch, verdict.accumulate, chosen, wish)
    card = _card("auto", around)
    return Placed(card, verdict.batch, verdict.accumulate, chosen, wish, _rent(recipe, settings, judged, chosen))


def _card(wanted: str, around: Around) -> HostCard:
    return choose_card(wanted, list(around.cards), around.paused, dict(around.busy), around.cut)


def _has_choice(recipe: Finetune, around: Around) -> bool:
    """A plan counts the tokens of the whole dataset. Where there is one CPU and nothing to decide, it is not made."""
    own = [each for each in around.cards if is_named(each, recipe.card)]
    only_cpu = all(each.card.is_cpu for each in own)
    return recipe.cloud is not None or recipe.train.batch == "auto" or not only_cpu


def _rent(recipe: Finetune, settings: Settings, judged: list[Judged], chosen: Judged) -> dict[str, Any]:
    """Only cards on which the chosen batch fits: a job's batch is settled before its pod is."""
    offered = [each for each in rentable(judged) if each.verdict.batch >= chosen.verdict.batch][:MOST_OFFERS]
    cap, expected = run_cap(recipe.budget.max_usd, settings.budgets, recipe.name), chosen.verdict.usd
    assert expected is not None
    if expected.low > cap:
        raise BudgetError(
            f"${expected.low:.2f} to ${expected.high:.2f} are expected on {chosen.candidate.name}, and ${cap:.2f} is "
            "what the run may cost", place="budget of the run",
            fix="raise `budget.max_usd` in the recipe, train on fewer rows, or name other `cloud.gpus`; `ft plan` "
            "shows all",
        )  # fmt: skip
    dearest = max(each.verdict.usd.high for each in offered if each.verdict.usd)
    return {"offers": [asdict(_offer(each)) for each in offered], "reserve_usd": round(dearest * RESERVED, 4)}


def _offer(judged: Judged) -> Offer:
    here = judged.candidate
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

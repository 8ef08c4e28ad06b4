"""Where a version is evaluated: on an own card that can serve the base; where none can, in a pod, if one may be rented.

Pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from registry.candidates import CPU_SECONDS, Candidate, Judged, served_on
from registry.card_profiles import GIB
from registry.errors import DoesNotFit
from registry.histogram import Histogram, Lengths
from registry.plan import Wish
from registry.plan_serving import Served
from registry.recipe import Recipe
from registry.train_time import Interval

# Candidate, champion and the bare base.
SUBJECTS = 3
# In a pod vLLM is installed first, some gigabytes; and everywhere it starts. Guesses: they were not measured in a pod.
INSTALL, START = Interval(60, 180, 600), Interval(30, 90, 300)
LOADING = Interval(0.3e9, 0.8e9, 2.5e9)
# Of what the card could: reading the weights for each token, and the arithmetic of prompts.
READING, PROMPTS = Interval(0.25, 0.5, 0.8), Interval(0.15, 0.35, 0.6)
# Of the card's memory: vLLM's own --gpu-memory-utilization.
TAKEN = 0.9
# Its environment on the pod's disk, with torch and CUDA's libraries.
VLLM_BYTES = 15e9
# Of max_new_tokens: how long answers are.
ANSWERS = Interval(0.1, 0.4, 1.0)


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation would be on one place. `context`: tokens that vLLM is started with; `usd` is None where it is
    free."""

    candidate: Candidate
    served: Served
    context: int
    seconds: Interval
    usd: Interval | None

    @property
    def may_fit(self) -> bool:
        """Of an own card the expected memory decides: a wrong no would cost money."""
        return self.served.fits or self.served.memory.total <= self.served.available

    @property
    def fits(self) -> bool:
        """Of a rented one all that vLLM is started with must be there (serving/vllm_process.py): the whole context and
        CUDA graphs, within the part of the card that it takes by itself."""
        whole = not self.served.serving.eager and self.served.serving.max_context >= self.context
        return self.served.fits and whole and self.served.memory.high <= TAKEN * self.candidate.place.whole

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.candidate.name, "gpu": self.candidate.gpu, "cloud": self.candidate.cloud,
                "usd_per_hour": self.candidate.place.usd_per_hour, "seconds": asdict(self.seconds),
                "usd": asdict(self.usd) if self.usd else None}  # fmt: skip


@dataclass(frozen=True)
class EvaluationPlan:
    """`cards`: own cards (HOST/CARD) that can do it; `rented`: where there are none, what may be rented for it, by
    price. With neither it is tried on the card of the training."""

    cards: tuple[str, ...] = ()
    rented: tuple[Evaluated, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {"on": "runpod" if self.rented else "card", "cards": list(self.cards),
                "rented": [each.as_dict() for each in self.rented]}  # fmt: skip


def plan_evaluation(
    recipe: Recipe, wish: Wish, histogram: Histogram, judged: Sequence[Judged], chosen: Judged
) -> EvaluationPlan:
    """For a run that trains on `chosen`. Raises DoesNotFit where it trains in a pod, and no card could evaluate."""
    rows = histogram.splits["test"].thinned(recipe.data.max_test)
    found = [evaluated(recipe, wish, rows, each.candidate) for each in judged]
    own = [each for each in found if each.candidate.kind == "card" and _can(recipe, each)]
    if chosen.candidate.kind == "card":
        # The run's host looks after it: cards of others are not taken.
        own = [each for each in own if each.candidate.host == chosen.candidate.host]
    rented = [each for each in found if each.candidate.kind == "runpod" and not each.candidate.why_not]
    fitting = sorted((each for each in rented if each.fits), key=_price)
    if own or (not fitting and chosen.candidate.kind == "card"):
        return EvaluationPlan(cards=tuple(each.candidate.name for each in own))
    if not fitting:
        raise _nowhere(recipe, rented)
    _refuse_small_disk(recipe, wish)
    return EvaluationPlan(rented=tuple(fitting))


def evaluated(recipe: Recipe, wish: Wish, rows: Lengths, candidate: Candidate) -> Evaluated:
    """What it would be there, whether it fits or not."""
    seconds, place = _seconds(recipe, wish, rows, candidate), candidate.place
    price = place.usd_per_hour
    usd = seconds.times((price + place.storage_usd_per_hour) / 3600) if price is not None else None
    context = min(recipe.serve.max_context, wish.geometry.max_positions)
    return Evaluated(candidate, served_on(recipe, wish, candidate), context, seconds, usd)


def _can(recipe: Recipe, one: Evaluated) -> bool:
    """Is it an own card that can serve the base? With `cloud` a CPU is not taken for hours."""
    too_slow = recipe.cloud is not None and one.candidate.is_cpu and one.seconds.mid > CPU_SECONDS
    return one.may_fit and not (too_slow and recipe.card != "cpu")


def _seconds(recipe: Recipe, wish: Wish, rows: Lengths, candidate: Candidate) -> Interval:
    profile, weights = candidate.place.profile, 2 * wish.geometry.parameters
    asked = rows.rows + len(recipe.evaluate.probes)
    at_once = max(1, min(recipe.evaluate.concurrency, recipe.serve.concurrency, asked))
    steps = ANSWERS.times(recipe.evaluate.max_new_tokens * SUBJECTS * asked / at_once)
    token = _per(weights / (profile.bandwidth_gbs * 1e9), READING)
    prompts = _per(2 * SUBJECTS * rows.tokens * wish.geometry.active / (profile.tflops * 1e12), PROMPTS)
    answers = Interval(steps.low * token.low, steps.mid * token.mid, steps.high * token.high)
    install = INSTALL if candidate.kind == "runpod" else Interval(0, 0, 0)
    return candidate.place.start + install + START + _per(weights, LOADING) + prompts + answers


def _per(amount: float, rate: Interval) -> Interval:
    return Interval(amount / rate.high, amount / rate.mid, amount / rate.low)


def _price(one: Evaluated) -> tuple[bool, float]:
    return one.candidate.availability == "NONE", one.usd.mid if one.usd else 0.0


def _nowhere(recipe: Recipe, rented: Sequence[Evaluated]) -> DoesNotFit:
    lines = [f"{each.candidate.name}: {_lacking(each)}" for each in rented]
    return DoesNotFit(
        "\n".join([f"{recipe.base.model} could be trained, but no card that the recipe allows can serve it, so that "
                   "the version could be judged", *(lines or ["it allows none that is there"])]),
        place="cloud", fix="name a card with more memory in `cloud.gpus`, raise `cloud.max_usd_per_hour`, or lower "
        "`serve.max_context`; `ft plan --all` shows all cards",
    )  # fmt: skip


def _refuse_small_disk(recipe: Recipe, wish: Wish) -> None:
    needed = (2 * wish.geometry.parameters + VLLM_BYTES) / 1e9
    if recipe.cloud and not recipe.cloud.network_volume and needed > recipe.cloud.disk_gb:
        what = f"the base and vLLM need {needed:.0f} GB of disk in the evaluation's pod"
        raise DoesNotFit(what, place="cloud.disk_gb",
                         fix=f"write {math.ceil(needed / 10) * 10} there, or name a `network_volume`")  # fmt: skip


def _lacking(one: Evaluated) -> str:
    there = min(one.served.available, TAKEN * one.candidate.place.whole)
    return f"{one.served.memory.high / GIB:.1f} GiB needed at least, {there / GIB:.1f} there for vLLM"

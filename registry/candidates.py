"""Every place where a recipe could be trained, and which of them it gets: own cards of all hosts, then rented ones.

`candidates` and `choose` are pure; `look_around` reads what they need.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from registry import runs
from registry.budgets import DISK_USD_PER_GB_HOUR
from registry.calibration import measured
from registry.card_profiles import CPU, GIB, CardProfile, by_runpod_id, sized_profile, usable_memory
from registry.cards import Card, ServeMode
from registry.errors import BaseModelError, DoesNotFit, WrongInput
from registry.folders import folder_id
from registry.geometry import Geometry, geometry_of, known_geometry
from registry.gpu_prices import CLOUDS, GpuPrice, Prices, gpu_prices, seed_prices
from registry.histogram import Histogram
from registry.hosts import HostCard, all_cards, cut_off, hosts, is_named, pauses
from registry.plan import Measured, Place, Verdict, Wish, plan_training
from registry.plan_serving import Served, ServeWish, plan_serving
from registry.recipe import Recipe
from registry.serve_memory import Precision
from registry.settings import Settings
from registry.store import Store
from registry.train_time import Interval

EVAL_ROWS = 48
# As serving/vllm_process.py starts vLLM: the base as it is, and room for adapters of at least this rank.
SERVED_IN: tuple[Precision, ...] = ("bf16",)
LEAST_RANK = 8
# Until a pod trains: it is made, pulls its image and fetches the base model. Nobody publishes how long that takes, and
# it was not measured yet.
POD_START = Interval(60, 180, 600)
# Where there is a GPU, or `cloud`, `card: auto` does not take the CPU for what would take longer: that a card is too
# small is no reason for weeks.
CPU_SECONDS = 2 * 3600.0
# A card that is in no list: slow, so that nobody is promised too much.
UNLISTED_GBS, UNLISTED_TFLOPS = 250.0, 20.0
NO_PRICE = "its price is not known"


@dataclass(frozen=True)
class Candidate:
    """`name` is for people: HOST/CARD, or RunPod's card with its cloud. `why_not` says why the recipe forbids it.

    `queue`: runs that are planned for it. Of an own card `host` and `card` are set, of a rented one `gpu` and `cloud`.
    """

    name: str
    kind: Literal["card", "runpod"]
    place: Place
    memory: int
    queue: int = 0
    paused: bool = False
    why_not: str = ""
    host: str = ""
    card: str = ""
    gpu: str = ""
    cloud: str = ""
    availability: str = ""
    serve: ServeMode = "evict"

    @property
    def is_cpu(self) -> bool:
        return self.place.profile.is_cpu


@dataclass(frozen=True)
class Judged:
    """A candidate and what the plan says of it."""

    candidate: Candidate
    verdict: Verdict

    def as_dict(self) -> dict[str, Any]:
        here = self.candidate
        return {
            "name": here.name, "kind": here.kind, "title": here.place.profile.name, "memory": here.memory,
            "queue": here.queue, "paused": here.paused, "why_not": here.why_not, "host": here.host, "card": here.card,
            "gpu": here.gpu, "cloud": here.cloud, "usd_per_hour": here.place.usd_per_hour,
            "availability": here.availability, "serve": here.serve, **self.verdict.as_dict(),
        }  # fmt: skip


@dataclass(frozen=True)
class Around:
    """What there is now: cards with who waits for each (by HOST/CARD), prices, what earlier runs measured.

    `cut`: why the cards of some hosts cannot be had, by host.
    """

    cards: Sequence[HostCard]
    paused: frozenset[str]
    busy: Mapping[str, int]
    prices: Prices
    measured: Sequence[Measured] = ()
    cut: Mapping[str, str] = field(default_factory=dict)


def look_around(store: Store, settings: Settings, *, prices: bool, besides: str = "") -> Around:
    """`prices`: ask RunPod for its own; else the table will do. `besides`: a run that does not count as waiting."""
    on = [run.result for run in runs.listed(store, active=True, limit=1000) if run.id != besides]
    busy = Counter(f"{each['host']}/{each['card']}" for each in on if "host" in each)
    others = hosts(store)
    there, cut = all_cards(others, settings.cards), cut_off(others, folder_id(store.home), settings.bucket)
    known = gpu_prices(store.home, settings) if prices else seed_prices()
    return Around(there, frozenset(pauses(store)), busy, known, measured(store), cut)


def wish_of(recipe: Recipe, histogram: Histogram, config: Mapping[str, Any] | None) -> Wish:
    """What the recipe wants, for the planner. `config` is the base's config.json, None where it is not here.

    Raises BaseModelError for a base whose shape nobody knows.
    """
    geometry = geometry_of(config, recipe.base.model) if config else known_geometry(recipe.base.model)
    if geometry is None:
        raise BaseModelError(f"the shape of {recipe.base.model} is not known here", place="base.model",
                             fix="`ft run` fetches the model; or check the network, and plan again")  # fmt: skip
    rows = histogram.splits["train"].thinned(recipe.data.max_train)
    eval_rows = min(EVAL_ROWS, histogram.splits["eval"].rows)
    return Wish(geometry, recipe.train, rows.counts, model=recipe.base.model, stack=recipe.train.backend,
                eval_rows=eval_rows)  # fmt: skip


def served_on(recipe: Recipe, wish: Wish, candidate: Candidate) -> Served:
    """Whether the base with its adapters can be served there, while nothing is trained."""
    return plan_serving(serve_wish(recipe, wish.geometry), candidate.place)


def serve_wish(recipe: Recipe, geometry: Geometry) -> ServeWish:
    want = recipe.serve
    return ServeWish(geometry, want.max_context, want.concurrency, rank=max(LEAST_RANK, recipe.train.lora.rank),
                     precisions=SERVED_IN, name=recipe.model)  # fmt: skip


def judge(recipe: Recipe, wish: Wish, around: Around) -> list[Judged]:
    """Every candidate with its verdict: own cards first, then rented ones by what they are expected to cost."""
    found = candidates(recipe, around)
    judged = [Judged(each, plan_training(wish, each.place, around.measured)) for each in found]
    return sorted(judged, key=lambda each: (each.candidate.kind == "runpod", *_price_order(each)))


def candidates(recipe: Recipe, around: Around) -> list[Candidate]:
    """Own cards as they are listed, then RunPod's, each with why the recipe forbids it. Pure."""
    own = [_own(recipe, each, around) for each in around.cards]
    return own + [_rented(recipe, each) for each in _priced(recipe, around.prices)]


def choose(recipe: Recipe, judged: Sequence[Judged]) -> Judged:
    """The own card that fits: one that is not paused, an accelerator, the least wanted. Where none fits, the rented one
    that is expected to cost least. Then an own one on which it is tight. Pure.

    Raises DoesNotFit with how much each allowed card lacks, and which one would do; WrongInput for a card that is
    nowhere.
    """
    allowed = [each for each in judged if not each.candidate.why_not]
    _refuse_nowhere(recipe, judged)
    own = [each for each in allowed if each.candidate.kind == "card" and not too_slow(recipe, each, judged)]
    for fitting in ([each for each in own if each.verdict.fits], rentable(judged),
                    [each for each in own if each.verdict.tight]):  # fmt: skip
        if fitting:
            return min(fitting, key=_own_order) if fitting[0].candidate.kind == "card" else fitting[0]
    raise _refusal(recipe, allowed, judged)


def rentable(judged: Sequence[Judged]) -> list[Judged]:
    """What may be rented and fits, by what it is expected to cost; what RunPod has none of just now comes last."""
    fitting = [each for each in judged if each.candidate.kind == "runpod" and not each.candidate.why_not]
    fitting = [each for each in fitting if each.verdict.fits]
    return sorted(fitting, key=lambda each: (each.candidate.availability == "NONE", *_price_order(each)))


def too_slow(recipe: Recipe, one: Judged, judged: Sequence[Judged]) -> bool:
    """Is it a CPU that `card: auto` does not take, because the recipe is meant for better?"""
    if recipe.card != "auto" or not one.candidate.is_cpu or one.verdict.seconds.mid <= CPU_SECONDS:
        return False
    return recipe.cloud is not None or any(each.candidate.host and not each.candidate.is_cpu for each in judged)


def lacking(judged: Judged) -> str:
    """By how much the training misses the place, in words."""
    memory, there = judged.verdict.memory, judged.verdict.available
    needed = f"needs {memory.total / GIB:.1f} GiB (up to {memory.high / GIB:.1f}), {there / GIB:.1f} there"
    return f"{needed}: {(memory.high - there) / GIB:.1f} GiB too much"


def profile_for(card: Card) -> CardProfile:
    """What is known of such a card; a slow guess for one in no list. Raises WrongInput for ft.yaml's `profile`."""
    if card.is_cpu:
        return CPU
    found = sized_profile(card.known_as, card.memory)
    if found is None and card.profile:
        raise WrongInput(f"no card is known as '{card.profile}'", place=f"ft.yaml: cards.{card.name}.profile",
                         fix="write the name as the maker does: RTX 4070 SUPER, A100 PCIe 80GB")  # fmt: skip
    return found or CardProfile(card.title, card.memory / GIB, UNLISTED_GBS, UNLISTED_TFLOPS, card.capability or "8.0")


def available(card: Card, profile: CardProfile) -> int:
    """Bytes for a trainer: without what others hold, what driver and desktop keep, and what ft.yaml keeps free."""
    if card.is_cpu:
        return card.free
    # A desktop's windows are already among what others hold, where they hold anything.
    there = min(usable_memory(card.memory, card.title), int(card.memory * 0.98) - card.used) - card.keep_free
    most = [each for each in (card.limit, profile.usable if card.profile else None) if each is not None]
    return max(0, min([there, *most]))


def _own(recipe: Recipe, place: HostCard, around: Around) -> Candidate:
    card, profile = place.card, profile_for(place.card)
    there = Place(place.name, profile, available(card, profile), total=card.memory)
    named = f"the recipe names another (`card: {recipe.card}`)"
    return Candidate(
        name=place.name, kind="card", place=there, memory=card.memory,
        queue=around.busy.get(place.name, 0), paused=place.name in around.paused,
        why_not=around.cut.get(place.host, "") if is_named(place, recipe.card) else named,
        host=place.host, card=card.name,
        serve=card.serve,
    )  # fmt: skip


def _priced(recipe: Recipe, prices: Prices) -> list[tuple[GpuPrice, CardProfile]]:
    """RunPod's cards that a plan can be made for: those that are known, and those that the recipe names."""
    wanted = recipe.cloud.gpus if recipe.cloud else []
    unknown = [gpu for gpu in wanted if gpu not in {each.gpu for each in prices.of}]
    nameless = [
        (gpu, cloud) for gpu in unknown for cloud in CLOUDS if recipe.cloud and recipe.cloud.cloud in (cloud, "any")
    ]
    found = []
    for each in (*prices.of, *(GpuPrice(gpu, gpu, 0, cloud, 0.0) for gpu, cloud in nameless)):
        profile = by_runpod_id(each.gpu)
        if profile is None and each.gpu in wanted and each.memory_gb:
            profile = CardProfile(each.name, each.memory_gb, UNLISTED_GBS, UNLISTED_TFLOPS, "8.0", (each.gpu,))
        if profile is not None:
            found.append((each, profile))
    return found


def _rented(recipe: Recipe, found: tuple[GpuPrice, CardProfile]) -> Candidate:
    price, profile = found
    disk = (recipe.cloud.disk_gb if recipe.cloud else 60) * DISK_USD_PER_GB_HOUR
    name = f"runpod/{profile.name} {price.cloud}"
    place = Place(name, profile, None, price.usd_per_hour or None, storage_usd_per_hour=disk, start=POD_START)
    return Candidate(
        name=name, kind="runpod", place=place, memory=int(profile.memory_gib * GIB), gpu=price.gpu,
        cloud=price.cloud, availability=price.availability, why_not=_forbids(recipe, price),
    )  # fmt: skip


def _forbids(recipe: Recipe, price: GpuPrice) -> str:
    """Why the recipe does not let this one be rented; '' if it does."""
    terms = recipe.cloud
    if terms is None:
        return "the recipe has no `cloud`, so nothing is rented"
    if recipe.card not in ("auto", "runpod"):
        return f"the recipe names another (`card: {recipe.card}`)"
    if terms.gpus and price.gpu not in terms.gpus:
        return "not in cloud.gpus"
    if terms.cloud not in (price.cloud, "any"):
        return f"cloud.cloud is {terms.cloud}"
    if terms.data_centers and price.data_centers and not set(terms.data_centers) & set(price.data_centers):
        return f"none in {', '.join(terms.data_centers)}"
    if not price.usd_per_hour:
        return NO_PRICE
    if price.usd_per_hour > terms.max_usd_per_hour:
        return f"${price.usd_per_hour:.2f} an hour is more than cloud.max_usd_per_hour {terms.max_usd_per_hour:g}"
    return ""


def _own_order(judged: Judged) -> tuple[bool, bool, int]:
    return judged.candidate.paused, judged.candidate.is_cpu, judged.candidate.queue


def _price_order(judged: Judged) -> tuple[float, float]:
    usd = judged.verdict.usd
    return (usd.mid, judged.candidate.place.usd_per_hour or 0.0) if usd else (0.0, 0.0)


def _refuse_nowhere(recipe: Recipe, judged: Sequence[Judged]) -> None:
    own = [each.candidate for each in judged if each.candidate.kind == "card"]
    if recipe.card not in ("auto", "runpod") and all(each.why_not for each in own):
        raise WrongInput(f"no card '{recipe.card}'", place="card",
                         fix=f"there is: {', '.join(each.name for each in own)}; `ft cards` shows them")  # fmt: skip


def _refusal(recipe: Recipe, allowed: Sequence[Judged], judged: Sequence[Judged]) -> DoesNotFit:
    lines = [f"{each.candidate.name}: {_why(each)}" for each in allowed]
    lines += [f"{each.candidate.name}: {NO_PRICE}" for each in judged if each.candidate.why_not == NO_PRICE]
    named = recipe.cloud.gpus if recipe.cloud else []
    lines += [f"{each.candidate.name}: {each.candidate.why_not}" for each in judged if each.candidate.gpu in named
              and each.candidate.why_not not in ("", NO_PRICE)]  # fmt: skip
    lines = lines or ["it allows none that is there"]
    return DoesNotFit(
        f"{recipe.base.model} fits on no card that the recipe allows\n" + "\n".join(lines),
        place="card", fix="; ".join(_ways_out(recipe, allowed, judged)) or f"`ft plan` of {recipe.name} shows all",
    )  # fmt: skip


def _why(judged: Judged) -> str:
    if judged.verdict.fits or judged.verdict.tight:  # the CPU, which would be too slow
        return f"about {judged.verdict.seconds.mid / 3600:.0f} hours; `card: cpu` takes it all the same"
    return lacking(judged)


def _ways_out(recipe: Recipe, allowed: Sequence[Judged], judged: Sequence[Judged]) -> Iterable[str]:
    """The knob on the card that lacks least, and the best one that would do if the recipe allowed it."""
    near = [each for each in allowed if not each.candidate.is_cpu and any(k.then_fits for k in each.verdict.knobs)]
    if near:
        least = min(near, key=lambda each: each.verdict.memory.high - each.verdict.available)
        yield f"on {least.candidate.name}: {next(k.text for k in least.verdict.knobs if k.then_fits)}"
    others = [each for each in judged if each.candidate.why_not and each.verdict.fits and not each.candidate.is_cpu]
    if others:
        usd = others[0].verdict.usd
        cost = f", for about ${usd.low:.2f} to ${usd.high:.2f}" if usd else ""
        yield f"{others[0].candidate.name} would do{cost} ({others[0].candidate.why_not})"

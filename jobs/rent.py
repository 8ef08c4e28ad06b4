"""Rent one pod for a job, or find the one that is rented already. May be killed at any point and called again.

The ledger is written before RunPod is asked. When nobody knows whether a pod was made, its name is looked for in the
list until the list must show it; only then it counts as not made, and the next attempt has another name.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from registry import ledger
from registry.cloud_terms import Budgets
from registry.errors import AnswerLost, CloudError, Conflict, FtError, NoCapacity, WrongKey
from registry.ledger import Intent
from registry.rentals import Rental, current, get, rentals, rented_pods
from registry.runpod_shapes import Pod, PodOrder
from registry.store import Store

# A list that fails is asked again for so long; then the caller is told, and whoever calls again goes on.
PATIENCE_SECONDS = 600.0
LONGEST_PAUSE, SHORTEST_PAUSE = 3.0, 0.05
MOST_LOST = 3


class Cloud(Protocol):
    """What is asked of RunPod for pods (`registry/runpod_api.py`)."""

    def pods(self) -> list[Pod]: ...

    def pod(self, id: str, /) -> Pod | None: ...

    def create(self, order: PodOrder, /) -> Pod: ...

    def terminate(self, id: str, /) -> None: ...

    def billing(self, since: float | None = None, pod: str | None = None) -> dict[str, float]: ...


@dataclass(frozen=True)
class Offer:
    """A card in a cloud at its price as we know it; `cloud` is secure or community."""

    gpu: str
    cloud: str
    usd_per_hour: float


@dataclass(frozen=True)
class Wish:
    """What is wanted. `max_usd` is the recipe's budget, `reserve_usd` what to reserve of it (None: all there is)."""

    job: str
    recipe: str
    model: str
    offers: tuple[Offer, ...]
    budgets: Budgets
    max_usd_per_hour: float
    max_usd: float | None = None
    reserve_usd: float | None = None
    disk_gb: int = 0


@dataclass
class _Renting:
    store: Store
    cloud: Cloud
    wish: Wish
    order_of: Callable[[Rental], PodOrder]
    settle_seconds: float
    sleep: Callable[[float], None]
    left: list[Offer] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    lost: int = 0


def rent(
    store: Store,
    cloud: Cloud,
    wish: Wish,
    order_of: Callable[[Rental], PodOrder],
    *,
    settle_seconds: float,
    sleep: Callable[[float], None] = time.sleep,
) -> Rental:
    """The job's live rental: the one that is there, or a new one of the cheapest card that is free.

    `order_of` makes the order for a rental (its name, attempt, gpu and cloud). `sleep` may raise to give up: whatever
    is in the air then is settled by the next call, or by the reaper. Raises BudgetError, NoCapacity, NoCredit,
    WrongKey, AnswerLost (after several attempts), Conflict (somebody ended the rental meanwhile), CloudError.
    """
    renting = _Renting(store, cloud, wish, order_of, settle_seconds, sleep)
    renting.left = sorted(wish.offers, key=lambda each: each.usd_per_hour)
    while True:
        rental = current(store, wish.job)
        if rental is None:
            rental = _attempt(renting)
        elif rental.state == "intended":
            rental = _settle(renting, rental)
        if rental is not None and rental.state == "live":
            return rental


def end_rental(store: Store, cloud: Cloud, name: str, reason: str) -> bool:
    """Nobody needs the rental's pod any more: end it. False if RunPod did not take it; the reaper goes on trying."""
    ledger.want_ended(store, name, reason)
    taken = [end_pod(store, cloud, each.pod) for each in rented_pods(store, name=name) if each.ended is None]
    return all(taken)


def end_pod(store: Store, cloud: Cloud, pod: str) -> bool:
    """Tell RunPod to end a pod, and write down that it took it."""
    try:
        cloud.terminate(pod)
    except CloudError as error:
        print(f"pod {pod} is not ended yet: {error}", file=sys.stderr, flush=True)
        return False
    ledger.note_gone(store, pod, time.time())
    return True


def _attempt(renting: _Renting) -> Rental | None:
    """Write down a new attempt, and have the first card that is free. None: look again."""
    wish, left = renting.wish, renting.left
    if not left:
        raise _nothing_free(renting)
    for earlier in rentals(renting.store, open_=True, job=wish.job):
        end_rental(renting.store, renting.cloud, earlier.name, earlier.reason)
    first = left[0]
    intent = Intent(
        wish.job, wish.recipe, wish.model, first.gpu, first.cloud, first.usd_per_hour,
        reserved_usd=wish.reserve_usd, max_usd=wish.max_usd, max_usd_per_hour=wish.max_usd_per_hour,
        disk_gb=wish.disk_gb,
    )  # fmt: skip
    try:
        rental = ledger.intend(renting.store, intent, wish.budgets)
    except Conflict:  # another process rents for the same job
        return None
    return _create(renting, rental)


def _create(renting: _Renting, rental: Rental) -> Rental | None:
    store, name = renting.store, rental.name
    while renting.left:
        offer = renting.left[0]
        if not ledger.re_aim(store, name, offer.gpu, offer.cloud, offer.usd_per_hour):
            _refuse_ended(store, name)
            return None
        order, asked_at = _order(renting, name), time.time()
        try:
            pod = renting.cloud.create(order)
        except NoCapacity as error:
            renting.refusals.append(f"{offer.gpu} ({offer.cloud}): {error.what}")
            renting.left.remove(offer)
            continue
        except AnswerLost as error:
            return _after_lost_answer(renting, name, error)
        except CloudError as error:  # no credit, a wrong key, a wrong order: nothing was made
            ledger.void(store, name, error.what)
            raise
        return _take(renting, name, pod, asked_at)
    ledger.void(store, name, "nothing was free")
    raise _nothing_free(renting)


def _order(renting: _Renting, name: str) -> PodOrder:
    try:
        return renting.order_of(get(renting.store, name))
    except FtError as error:  # RunPod was not asked yet
        ledger.void(renting.store, name, error.what)
        raise


def _after_lost_answer(renting: _Renting, name: str, error: AnswerLost) -> Rental | None:
    renting.lost += 1
    found = _settle(renting, get(renting.store, name))
    if found is None and renting.lost >= MOST_LOST and current(renting.store, renting.wish.job) is None:
        raise error
    return found


def _settle(renting: _Renting, rental: Rental) -> Rental | None:
    """Look for the pod of an intended rental until the list must show it. None: there is none, look again.

    The time begins anew when somebody else goes on with the rental meanwhile.
    """
    store, since, patience = renting.store, time.monotonic(), time.monotonic() + PATIENCE_SECONDS
    touched = rental.body.get("touched")
    pause = max(SHORTEST_PAUSE, min(LONGEST_PAUSE, renting.settle_seconds / 10))
    while True:
        waited = time.monotonic() - since
        found = _look_for(renting, rental.name, patience)
        rental = get(store, rental.name)
        if rental.state != "intended":
            _refuse_ended(store, rental.name)
            return rental if rental.state == "live" else None
        if rental.body.get("touched") != touched:
            touched, since = rental.body.get("touched"), time.monotonic()
        elif found:
            return _adopt(renting, rental, found)
        elif found is not None and waited >= renting.settle_seconds:
            ledger.void(store, rental.name, "no pod of that name ever came")
            return None
        renting.sleep(pause)


def _look_for(renting: _Renting, name: str, patience: float) -> list[Pod] | None:
    """The pods of that name, the oldest first; None if RunPod could not be asked."""
    try:
        found = [each for each in renting.cloud.pods() if each.name == name and each.status != "TERMINATED"]
    except WrongKey:
        raise
    except CloudError:
        if time.monotonic() > patience:
            raise
        return None
    return sorted(found, key=lambda each: (each.created or 0.0, each.id))


def _adopt(renting: _Renting, rental: Rental, found: list[Pod]) -> Rental | None:
    taken = _take(renting, rental.name, found[0], None, adopted=True)
    for twin in found[1:]:
        ledger.note_pod(renting.store, rental.name, twin.id, twin.usd_per_hour, twin.created or time.time())
        end_pod(renting.store, renting.cloud, twin.id)
    return taken


def _take(renting: _Renting, name: str, pod: Pod, created: float | None, *, adopted: bool = False) -> Rental | None:
    """The pod becomes the rental's, unless it is too dear or the rental was settled otherwise: then it is ended."""
    taken = ledger.note_live(renting.store, name, pod.id, pod.usd_per_hour, created=created, adopted=adopted)
    if taken is not None and taken.state == "live":
        return taken
    end_pod(renting.store, renting.cloud, pod.id)
    if taken is None:
        _refuse_ended(renting.store, name)
        return None
    dear = [each for each in renting.left if (each.gpu, each.cloud) == (taken.gpu, taken.cloud)]
    renting.left = [each for each in renting.left if each not in dear]
    renting.refusals.append(f"{taken.gpu} ({taken.cloud}): {taken.reason}")
    return None


def _refuse_ended(store: Store, name: str) -> None:
    """Somebody settled it: a void one is tried anew, one that was to end is not."""
    rental = get(store, name)
    if rental.state in ("ending", "ended"):
        raise Conflict(f"the rental of a pod was ended meanwhile: {rental.reason or 'its job ended'}", place=name,
                       fix="`ft pods` shows what is rented")  # fmt: skip


def _nothing_free(renting: _Renting) -> NoCapacity:
    why = "; ".join(renting.refusals) or "no card was offered"
    return NoCapacity(
        f"no pod can be rented now: {why}", place="RunPod",
        fix="name more `gpus` or `cloud: any` in the recipe's `cloud`, or `ft resume` the run later",
    )  # fmt: skip

"""What the reaper does about the pods that it saw and the rentals that it then read. Pure.

The list of pods is older than the ledger that it is compared with: a pod that came between is in the ledger, so what
the ledger does not know is nobody's. The list may lag behind, so what it does not show may be there all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from registry.budgets import RentedPod
from registry.rentals import Rental
from registry.runpod_shapes import Pod

Kind = Literal["adopt", "want_ended", "end", "reap", "ask", "void", "close"]
# Whoever rents touches its row before each create, which may take so long; then another may settle it.
CREATE_SECONDS = 120.0


@dataclass(frozen=True)
class Act:
    """adopt: the pod becomes the rental's. want_ended: nobody needs the rental. end: a pod of such a rental.

    reap: a pod that no rental wants. ask: is a pod there that the list does not show? void: nothing was made.
    close: the rental is over.
    """

    kind: Kind
    name: str
    pod: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Look:
    """All that is known at one look. `pods`: those with a name of ours, None where RunPod gave no list.

    `rented` are pods not known to be gone and those that are listed, by id; `paid_until` by rental's name; `wants` says
    of a job whether it may have a pod; `quiet` for how many seconds a thing was seen to be as it is.
    """

    now: float
    settle: float
    pods: list[Pod] | None
    rentals: Mapping[str, Rental]
    rented: Mapping[str, RentedPod]
    paid_until: Mapping[str, float]
    wants: Callable[[str], bool]
    quiet: Callable[[str], float]

    def alive(self, name: str) -> list[Pod]:
        """Listed pods of that name, the oldest first, without those that RunPod only just took the order to end."""
        found = [each for each in self.pods or [] if each.name == name and not self.only_just_ended(each.id)]
        return sorted(found, key=lambda each: (each.created or 0.0, each.id))

    def only_just_ended(self, pod: str) -> bool:
        ended = self.rented[pod].ended if pod in self.rented else None
        return ended is not None and self.now - ended <= self.settle

    def is_listed(self, pod: str) -> bool:
        return any(each.id == pod for each in self.pods or [])


def decide(look: Look) -> list[Act]:
    """What to do, in this order; done twice it does no harm."""
    by_state = {"intended": _of_intended, "live": _of_live, "ending": _of_ending}
    found: list[Act] = []
    for rental in look.rentals.values():
        found += by_state.get(rental.state, _of_over)(look, rental)
    for pod in look.pods or []:
        if pod.name not in look.rentals and not look.only_just_ended(pod.id):
            found.append(Act("reap", pod.name, pod.id, "the ledger knows no such rental"))
    return [*found, *_missing(look)]


def _of_intended(look: Look, rental: Rental) -> Iterator[Act]:
    if not look.wants(rental.job):
        yield Act("want_ended", rental.name, reason="its run has ended")
    elif look.pods is not None:
        quiet = look.quiet(f"{rental.name} {rental.body.get('touched')}")
        pods = look.alive(rental.name)
        if quiet > look.settle + CREATE_SECONDS:
            nothing = Act("void", rental.name, reason="no pod of that name ever came")
            yield Act("adopt", rental.name, pods[0].id) if pods else nothing


def _of_live(look: Look, rental: Rental) -> Iterator[Act]:
    assert rental.pod is not None
    for twin in look.alive(rental.name):
        if twin.id != rental.pod:
            yield Act("reap", rental.name, twin.id, "a second pod of that name")
    if not look.wants(rental.job):
        yield Act("want_ended", rental.name, rental.pod, "its run has ended")
    elif look.now >= look.paid_until.get(rental.name, float("inf")):
        yield Act("want_ended", rental.name, rental.pod, "what was reserved for it is used up")
    elif rental.pod not in look.rented and not look.is_listed(rental.pod):
        yield Act("close", rental.name, rental.pod, "the pod ended by itself")


def _of_ending(look: Look, rental: Rental) -> Iterator[Act]:
    alive = look.alive(rental.name)
    lives = {each.pod for each in look.rented.values() if each.name == rental.name and each.ended is None}
    for pod in sorted(lives | {each.id for each in alive}):
        yield Act("end", rental.name, pod, rental.reason)
    listed = any(each.name == rental.name for each in look.pods or [])
    if look.pods is None or lives or listed:
        return
    # Without a known pod one may still come, if the answer to its create was lost.
    if rental.pod or look.quiet(f"{rental.name} {rental.body.get('touched')}") > look.settle:
        yield Act("close", rental.name, rental.pod or "")


def _of_over(look: Look, rental: Rental) -> Iterator[Act]:
    for pod in look.alive(rental.name):
        yield Act("reap", rental.name, pod.id, f"its rental is {rental.state}")


def _missing(look: Look) -> Iterator[Act]:
    """Pods that should be there and were not listed for longer than the list lags."""
    if look.pods is None:
        return
    for each in look.rented.values():
        if each.ended is None and not look.is_listed(each.pod) and look.quiet(f"missing {each.pod}") > look.settle:
            yield Act("ask", each.name, each.pod)

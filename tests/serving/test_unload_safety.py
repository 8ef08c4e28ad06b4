"""Whatever leaders, gateways, requests and clocks do: nothing is unloaded that a live gateway may still ask for.

The store is a dictionary here, and every step of reading and writing it is one of its own, which may come late, get
lost on its way back, or come after its sender has given it up.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from registry.gateways import GatewayRow, Ref, Watch
from registry.leases import MARGIN_SECONDS
from serving.leased import Lease
from serving.publishing import Gone

TERM = 10.0
NAMES = ["a", "b"]
REFS = {name: (name, "http://engine") for name in NAMES}
STEPS = [0.1, 4.0, TERM - 1, TERM + MARGIN_SECONDS]
WHICH = st.integers(0, 1)
Refs = frozenset[Ref]


@dataclass
class Gateway:
    """`sent`: renewals on their way to the store, each with when it began; `back`: those whose answer is on its way.

    `overdue` was under way when its lease ended: that is not waited for, the engine finishes what it has begun.
    """

    id: str
    lease: Lease
    generation: int = 0
    routes: Refs = frozenset()
    in_flight: list[Ref] = field(default_factory=list)
    overdue: Refs = frozenset()
    sent: list[tuple[float, GatewayRow]] = field(default_factory=list)
    back: list[tuple[float, int, int]] = field(default_factory=list)

    def row(self) -> GatewayRow:
        going = frozenset(self.in_flight) - self.routes
        return GatewayRow(self.id, "", "", 0.0, TERM, self.generation, going)


class Serving(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.published: tuple[int, Refs] = (0, frozenset())
        self.rows: dict[str, GatewayRow] = {}
        self.unloaded: Refs = frozenset()
        self.gateways = [Gateway(name, Lease(TERM, lambda: self.now)) for name in ("one", "two")]
        self.lead()

    def lead(self) -> None:
        """A new leader: it knows nothing of what the one before had seen."""
        self.gone, self.watch, self.routes = Gone(), Watch(lambda: self.now), frozenset[Ref]()

    @rule(seconds=st.sampled_from(STEPS))
    def time_goes_by(self, seconds: float) -> None:
        self.now += seconds

    @rule(names=st.frozensets(st.sampled_from(NAMES)), answer=st.sampled_from(["", "lost", "never written"]))
    def flip(self, names: frozenset[str], answer: str) -> None:
        """What it leads to is loaded before."""
        self.routes = frozenset(REFS[name] for name in names)
        self.unloaded -= self.routes
        self.gone.begin(self.routes)
        if answer != "never written":
            self.published = (self.published[0] + 1, self.routes)
        if not answer:
            self.gone.done(self.published[0], self.routes)

    @rule()
    def another_leads(self) -> None:
        self.lead()

    @invariant()
    def nobody_asks_for_what_is_unloaded(self) -> None:
        """A leader unloads what it may, as soon as it may."""
        living = self.watch.living(self.rows.values())
        for ref in REFS.values():
            since = self.gone.since(ref)
            if since is not None and all(each.asks_no_more(ref, since) for each in living):
                self.unloaded |= {ref}
        for each in self.gateways:
            going = frozenset(each.in_flight)
            each.overdue = each.overdue & going if each.lease.lasts else going
            if each.lease.lasts:
                assert not self.unloaded & each.routes, f"{each.id} would send its next request there"
                assert not self.unloaded & going - each.overdue, f"{each.id} has one under way"

    @rule(which=WHICH)
    def read(self, which: int) -> None:
        each = self.gateways[which]
        each.generation, each.routes = self.published

    @rule(which=WHICH)
    def begin_renewal(self, which: int) -> None:
        each = self.gateways[which]
        each.sent.append((self.now, each.row()))

    @rule(which=WHICH, nth=WHICH)
    def renewal_is_written(self, which: int, nth: int) -> None:
        each = self.gateways[which]
        if each.sent:
            began, row = each.sent.pop(nth % len(each.sent))
            self.write(row)
            each.back.append((began, row.acknowledged, self.published[0]))

    @rule(which=WHICH)
    def answer_comes(self, which: int) -> None:
        """A gateway waits for one answer before it does anything else, or has given it up."""
        each = self.gateways[which]
        if each.back:
            began, acknowledged, published = each.back.pop()
            if acknowledged == each.generation:
                each.lease.renewed(began, acknowledged, published)

    @rule(which=WHICH, reads=st.booleans(), seconds=st.sampled_from([0.0, 0.0, *STEPS]))
    def renewal(self, which: int, reads: bool, seconds: float) -> None:
        """All of it, with nothing of this gateway's in between, as it nearly always goes; some take their time."""
        each = self.gateways[which]
        if reads:
            self.read(which)
        began, row = self.now, each.row()
        self.now += seconds
        self.nobody_asks_for_what_is_unloaded()
        self.write(row)
        each.lease.renewed(began, row.acknowledged, self.published[0])

    @rule(which=WHICH, name=st.sampled_from(NAMES))
    def request_begins(self, which: int, name: str) -> None:
        each = self.gateways[which]
        if each.lease.lasts and REFS[name] in each.routes:
            each.in_flight.append(REFS[name])

    @rule(which=WHICH, nth=WHICH)
    def request_ends(self, which: int, nth: int) -> None:
        in_flight = self.gateways[which].in_flight
        if in_flight:
            in_flight.pop(nth % len(in_flight))

    def write(self, row: GatewayRow) -> None:
        beat = self.rows[row.id].beat + 1 if row.id in self.rows else 1
        self.rows[row.id] = replace(row, beat=beat)


TestServing = Serving.TestCase
TestServing.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)


@pytest.mark.parametrize("seed", range(4))
def test_at_random(seed: int) -> None:
    """Far more steps than hypothesis makes, with the usual ones most often."""
    chance = random.Random(seed)
    for _ in range(200):
        machine = Serving()
        for _ in range(80):
            act(machine, chance)
            machine.nobody_asks_for_what_is_unloaded()


def act(machine: Serving, chance: random.Random) -> None:
    which, nth, name = chance.randrange(2), chance.randrange(2), chance.choice(NAMES)
    names = frozenset(each for each in NAMES if chance.random() < 0.5)
    acts: list[tuple[int, Callable[[], None]]] = [
        (20, lambda: machine.renewal(which, chance.random() < 0.8, chance.choice([0.0, 0.0, 0.0, *STEPS]))),
        (10, lambda: machine.request_begins(which, name)),
        (7, lambda: machine.request_ends(which, nth)),
        (10, lambda: machine.flip(names, chance.choice(["", "", "lost", "never written"]))),
        (8, lambda: machine.time_goes_by(chance.choice(STEPS))),
        (6, lambda: machine.begin_renewal(which)),
        (6, lambda: machine.renewal_is_written(which, nth)),
        (6, lambda: machine.answer_comes(which)),
        (6, lambda: machine.read(which)),
        (1, machine.another_leads),
    ]
    chance.choices([each for _, each in acts], [weight for weight, _ in acts])[0]()

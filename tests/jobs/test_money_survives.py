"""Kills at any point of renting, ending and reaping, answers lost, lists that lag: the money is always right."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs.pod_reaper import Reaper
from jobs.rent import Offer, Wish, end_rental, rent
from registry import runs
from registry.cloud_terms import Budgets
from registry.errors import AnswerLost, CloudError, FtError, NoCapacity
from registry.project import Project
from registry.rentals import Rental, current, rentals, rented_pods
from registry.runpod_shapes import PodOrder
from registry.store import Changes, Connection, Database, Store, open_store
from tests.fakes.scripted_cloud import ScriptedCloud

LAG, SETTLE = 0.01, 0.03
BUDGETS = Budgets(run_usd=5, month_usd=40)
OFFERS = (Offer("NVIDIA A40", "secure", 0.4), Offer("NVIDIA L40", "secure", 0.7))
LOST = ("lost", AnswerLost("cut off"))
FAULTS = {
    "create": st.sampled_from([LOST, AnswerLost("never came"), NoCapacity("none"), CloudError("422"), "twice", 0.9]),
    "terminate": st.just(CloudError("500")),
    "pods": st.just(CloudError("502")),
}
MOVES = st.sampled_from(["rent 0", "rent 1", "end 0", "end 1", "over 0", "over 1", "look", "look", "wait", "die"])
KILLS = st.one_of(st.none(), st.integers(0, 12))


class Killed(BaseException):
    """What kill -9 does to a process: nothing after it is done."""


@dataclass
class Mortal:
    """Counts calls to the cloud and writes of the ledger together; the `left`-th is not reached, or just done."""

    left: int | None = None

    def step(self, _: str = "") -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                self.left = None
                raise Killed


@dataclass
class MortalDatabase:
    """The real database, before whose transactions the process may be killed."""

    real: Database
    mortal: Mortal

    @property
    def place(self) -> str:
        return self.real.place

    @place.setter
    def place(self, _: str) -> None: ...

    def connected(self) -> AbstractContextManager[Connection]:
        return self.real.connected()

    def begin(self, connection: Connection) -> None:
        self.mortal.step()
        self.real.begin(connection)

    def version(self, connection: Connection) -> int:
        return self.real.version(connection)

    def migrate(self, connection: Connection, number: int, script: str) -> None:
        self.real.migrate(connection, number, script)

    def changes(self) -> Changes:
        return self.real.changes()

    def give_back(self, *, whole: bool = False) -> None:
        self.real.give_back(whole=whole)


class World:
    """Two runs, one cloud, one process that may be killed and is started again at once."""

    def __init__(self, store: Store) -> None:
        self.mortal = Mortal()
        self.sound, self.store = store, Store(MortalDatabase(store.database, self.mortal), store.home)
        self.cloud = ScriptedCloud(lag=LAG, before=self.mortal.step)
        self.jobs = [runs.submit(store, {"name": name, "model": "m"}, "r.yaml", "d").id for name in ("one", "two")]
        self.foreign = self.cloud.start("ft-ffffff-one-a1").id
        self.new_process()

    def new_process(self) -> None:
        self.reaper = Reaper(self.store, self.cloud, BUDGETS, SETTLE, final_seconds=0.0)

    def move(self, what: str) -> None:
        self.cloud.pass_time(100)
        verb, _, number = what.partition(" ")
        job = self.jobs[int(number or 0)]
        if verb == "rent" and self.wants(job):
            self.rent(job)
        elif verb == "end" and (rental := current(self.store, job)):
            end_rental(self.store, self.cloud, rental.name, "the job is done")
        elif verb == "over":
            self.sound.note("UPDATE runs SET state = 'succeeded' WHERE id = ?", (job,))
        elif verb == "look":
            self.reaper.look()
        elif verb == "wait":
            time.sleep(SETTLE)
        elif verb == "die" and len(self.cloud.living) > 1:
            listed = [each for each in rented_pods(self.sound) if each.pod in self.cloud.living]
            for each in listed[:1]:
                self.cloud.end(each.pod)

    def rent(self, job: str) -> Rental:
        wish = Wish(job, "tickets", "m", OFFERS, BUDGETS, max_usd_per_hour=0.8)
        return rent(self.store, self.cloud, wish, order_of, settle_seconds=SETTLE)

    def wants(self, job: str) -> bool:
        return runs.get(self.sound, job).active

    def heal(self) -> None:
        """No faults any more; workers do what workers do: runs that are on rent, the reaper looks."""
        self.mortal.left = None
        self.cloud.faults.clear()
        end, quiet = time.monotonic() + 20, time.monotonic()
        self.new_process()
        while time.monotonic() < end:
            for job in filter(self.wants, self.jobs):
                with suppress(FtError):
                    self.rent(job)
            self.reaper._tries.clear()  # else it waits for seconds
            if self.reaper.look() or {each.state for each in rentals(self.sound, open_=True)} - {"live"}:
                quiet = time.monotonic()
            elif time.monotonic() - quiet > 2 * SETTLE:  # what the list did not show yet, it has shown
                return
            time.sleep(SETTLE / 3)
        raise AssertionError(f"never at rest: {rentals(self.sound, open_=True)}")


def order_of(rental: Rental) -> PodOrder:
    return PodOrder(rental.name, "image", rental.gpu, rental.cloud, {}, "", 20)


@contextmanager
def a_world() -> Iterator[World]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        yield World(open_store(Project(root=root, home=root / "home", cache=root / "cache")))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), moves=st.lists(st.tuples(MOVES, KILLS), min_size=1, max_size=8))
def test_kills_at_any_point_leave_the_wanted_pods_and_the_whole_bill(
    data: Any, moves: list[tuple[str, int | None]]
) -> None:
    faults = {verb: data.draw(st.lists(kinds, max_size=3), label=verb) for verb, kinds in FAULTS.items()}
    with a_world() as world:
        world.cloud.faults = {verb: list(kinds) for verb, kinds in faults.items()}
        for move, kill in moves:
            world.mortal.left = kill
            try:
                world.move(move)
            except Killed:
                world.new_process()
            except FtError:
                pass
            world.mortal.left = None
        world.heal()
        refuse_wrong(world)


def refuse_wrong(world: World) -> None:
    living = set(world.cloud.living) - {world.foreign}
    live = {each.job: each for each in rentals(world.sound, open_=True)}
    assert world.foreign in world.cloud.living, "another installation's pod was ended"
    assert living == {each.pod for each in live.values()}, (
        "a pod that nobody wants lives, or one that is wanted does not"
    )
    assert set(live) == {job for job in world.jobs if world.wants(job)}, "a run that is on has no pod"
    world.reaper.bill(at_once=True)
    truth = {id_: usd for id_, usd in world.cloud.bill.items() if id_ != world.foreign}
    for id_ in living:  # theirs is final only when they have ended
        end_rental(world.sound, world.cloud, next(e.name for e in live.values() if e.pod == id_), "the test is over")
    world.reaper.bill(at_once=True)
    booked = {each.pod: each.usd(time.time()) for each in rented_pods(world.sound)}
    assert booked == truth, "the ledger is not RunPod's bill"

"""Aliases move only as they may: against a model, in threads, in processes."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from registry import adapters
from registry.errors import Conflict, FtError, GateClosed, NotFound
from registry.events import read
from registry.project import Project
from registry.store import Store, open_store

ROOT = Path(__file__).parents[2]


def add(store: Store, number: int, model: str = "m") -> adapters.Version:
    return adapters.add_version(store, model, number, f"run-{model}-{number}", f"adapters/{model}/{number}", {})


def judged(store: Store, number: int, outcome: str = "pass", champion: int | None = None) -> adapters.Verdict:
    return adapters.add_verdict(store, "m", number, outcome, {"champion": champion, "checks": []}, None)


def promoted(store: Store, number: int) -> adapters.Promotion:
    champion = adapters.aliases(store, "m").get("champion")
    return adapters.promote(store, judged(store, number, champion=champion), by_whom="test")


def types(store: Store) -> list[str]:
    return [event.type for event in read(store)]


def test_a_run_registers_one_version_however_often_it_tries(store: Store) -> None:
    first = add(store, 1)
    again = adapters.add_version(store, "m", 2, first.run_id, "adapters/m/2", {"other": True})
    assert again == first
    assert adapters.versions(store) == [first]
    assert types(store) == ["adapter.registered"]
    assert adapters.aliases(store, "m") == {"candidate": 1}


def test_a_run_judges_once_however_often_its_step_is_repeated(store: Store) -> None:
    add(store, 1)

    def judge(run_id: str | None, outcome: str) -> adapters.Verdict:
        return adapters.add_verdict(store, "m", 1, outcome, {"champion": None}, run_id)

    first = judge("run-1", "pass")
    assert judge("run-1", "pass") == first
    assert types(store).count("adapter.judged") == 1
    # What is news is written down: another outcome, and a person who asks again.
    said = [first, judge("run-1", "fail"), judge("run-1", "pass"), judge(None, "pass"), judge(None, "pass")]
    assert len({each.id for each in said}) == types(store).count("adapter.judged") == 5


def test_promotion_moves_champion_and_previous(store: Store) -> None:
    add(store, 1)
    add(store, 2)
    assert promoted(store, 1).from_version is None
    moved = promoted(store, 2)
    assert (moved.version, moved.from_version, moved.kind) == (2, 1, "promote")
    assert adapters.aliases(store, "m") == {"candidate": 2, "champion": 2, "previous": 1}
    assert types(store).count("adapter.promoted") == 2


def test_a_run_promotes_once_however_often_it_tries(store: Store) -> None:
    add(store, 1)
    add(store, 2)
    verdict = judged(store, 1)
    first = adapters.promote(store, verdict, by_whom="ft", run_id="run-m-1")
    promoted(store, 2)
    assert adapters.promote(store, verdict, by_whom="ft", run_id="run-m-1") == first
    assert adapters.aliases(store, "m")["champion"] == 2
    assert len(adapters.promotions(store, "m")) == 2


@pytest.mark.parametrize("outcome", ["fail", "undecided"])
def test_without_a_pass_only_a_person_promotes(store: Store, outcome: str) -> None:
    add(store, 1)
    verdict = judged(store, 1, outcome)
    with pytest.raises(GateClosed, match="no passing verdict"):
        adapters.promote(store, verdict, by_whom="ft")
    assert adapters.aliases(store, "m") == {"candidate": 1}
    assert adapters.promote(store, verdict, by_whom="ann", person=True).by_whom == "ann"


def test_a_verdict_against_another_champion_does_not_count(store: Store) -> None:
    for number in (1, 2, 3):
        add(store, number)
    old = judged(store, 3, champion=None)
    promoted(store, 1)
    with pytest.raises(Conflict, match="judged against none, and the champion is version 1 now"):
        adapters.promote(store, old, by_whom="ft")
    against_1 = judged(store, 3, champion=1)
    promoted(store, 2)
    with pytest.raises(Conflict, match="version 2 now"):
        adapters.promote(store, against_1, by_whom="ft")
    assert adapters.aliases(store, "m")["champion"] == 2
    with pytest.raises(Conflict, match="champion already"):
        adapters.promote(store, judged(store, 2, champion=2), by_whom="ft")


def test_rollback_goes_back_and_what_was_rolled_back_needs_a_person(store: Store) -> None:
    add(store, 1)
    add(store, 2)
    with pytest.raises(NotFound, match="no previous version"):
        adapters.roll_back(store, "m", by_whom="ann")
    promoted(store, 1)
    promoted(store, 2)
    moved = adapters.roll_back(store, "m", by_whom="ann", reason="rude")
    assert (moved.version, moved.from_version, moved.kind, moved.reason) == (1, 2, "rollback", "rude")
    assert adapters.get_version(store, "m", 2).rolled_back
    assert adapters.aliases(store, "m")["champion"] == 1
    with pytest.raises(GateClosed, match="rolled back"):
        adapters.promote(store, judged(store, 2, champion=1), by_whom="ft")
    adapters.promote(store, judged(store, 2, champion=1), by_whom="ann", person=True)
    assert adapters.aliases(store, "m") == {"candidate": 2, "champion": 2, "previous": 1}


def test_rollback_to_a_version_that_is_not_there_changes_nothing(store: Store) -> None:
    add(store, 1)
    promoted(store, 1)
    before = adapters.aliases(store, "m"), types(store)
    for to, error in ((7, NotFound), (1, Conflict)):
        with pytest.raises(error):
            adapters.roll_back(store, "m", by_whom="ann", to=to)
    assert (adapters.aliases(store, "m"), types(store)) == before
    assert not adapters.get_version(store, "m", 1).rolled_back


def test_references(store: Store) -> None:
    add(store, 1)
    add(store, 2)
    promoted(store, 1)
    assert adapters.find_version(store, "m").version == 1
    assert adapters.find_version(store, "m@champion").version == 1
    assert adapters.find_version(store, "m@candidate").name == "m@2"
    assert adapters.find_version(store, "m@2").version == 2
    for wrong in ("m@3", "m@previous", "other", "m@"):
        if wrong != "m@":
            with pytest.raises(NotFound):
                adapters.find_version(store, wrong)


def _outcome(work: Callable[[], adapters.Promotion]) -> str:
    try:
        work()
    except FtError as error:
        return type(error).__name__
    return "moved"


def test_of_many_threads_with_the_same_champion_in_mind_one_wins(store: Store) -> None:
    for number in range(1, 13):
        add(store, number)
    promoted(store, 1)
    verdicts = [judged(store, number, champion=1) for number in range(2, 13)]
    with ThreadPoolExecutor(11) as pool:
        said = list(pool.map(lambda each: _outcome(lambda: adapters.promote(store, each, by_whom="ft")), verdicts))
    assert sorted(said) == ["Conflict"] * 10 + ["moved"]
    assert len(adapters.promotions(store, "m")) == 2


def test_of_many_threads_of_one_run_one_moves_and_all_get_the_same(store: Store) -> None:
    add(store, 1)
    verdict = judged(store, 1)
    with ThreadPoolExecutor(8) as pool:
        moves = set(pool.map(lambda _: adapters.promote(store, verdict, by_whom="ft", run_id="run-m-1"), range(16)))
    assert len(moves) == len(adapters.promotions(store, "m")) == 1


RACER = """
import sys, time
from pathlib import Path
from registry import adapters
from registry.errors import Conflict
from registry.project import find_project
from registry.store import open_store
store, number, start = open_store(find_project(Path(sys.argv[1]))), int(sys.argv[2]), float(sys.argv[3])
time.sleep(max(0, start - time.time()))
moved = 0
for _ in range(25):
    champion = adapters.aliases(store, "m").get("champion")
    verdict = adapters.add_verdict(store, "m", number, "pass", {"champion": champion}, None)
    try:
        adapters.promote(store, verdict, by_whom=str(number))
        moved += 1
    except Conflict:
        pass
print(moved)
"""


def test_processes_that_race_leave_one_chain_of_moves(project: Project, store: Store) -> None:
    """Every move starts from where the one before it ended: no lost update, whoever won."""
    import time

    for number in (1, 2, 3):
        add(store, number)
    start = str(time.time() + 1.5)
    racers = [
        subprocess.Popen([sys.executable, "-c", RACER, str(project.root), str(number), start],
                         cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for number in (1, 2, 3)
    ]  # fmt: skip
    moved = [int(racer.communicate(timeout=120)[0]) for racer in racers]
    chain = adapters.promotions(store, "m")
    assert len(chain) == sum(moved) > 3
    assert [each.from_version for each in chain] == [None, *(each.version for each in chain[:-1])]
    assert adapters.aliases(store, "m")["champion"] == chain[-1].version
    assert adapters.aliases(store, "m")["previous"] == chain[-1].from_version


class AliasMachine(RuleBasedStateMachine):
    """Any order of registering, judging, promoting and rolling back, against a model of a few dicts."""

    @initialize()
    def open(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        here = Path(self.folder.name)
        self.store = open_store(Project(root=here, home=here / ".ft", cache=here))
        self.named: dict[str, int] = {}
        self.rolled_back: set[int] = set()
        self.verdicts: list[adapters.Verdict] = []
        self.moves: list[tuple[str, int | None, int]] = []
        self.count = 0

    def teardown(self) -> None:
        self.folder.cleanup()

    @rule(again=st.booleans())
    def register(self, again: bool) -> None:
        if not (again and self.count):
            self.count += 1
            self.named["candidate"] = self.count
        assert add(self.store, self.count).version == self.count

    @precondition(lambda self: self.count)
    @rule(data=st.data(), outcome=st.sampled_from(["pass", "pass", "fail", "undecided"]))
    def judge(self, data: st.DataObject, outcome: str) -> None:
        number = data.draw(st.integers(1, self.count))
        self.verdicts.append(judged(self.store, number, outcome, self.named.get("champion")))

    @precondition(lambda self: self.verdicts)
    @rule(data=st.data(), person=st.booleans())
    def promote(self, data: st.DataObject, person: bool) -> None:
        verdict = data.draw(st.sampled_from(self.verdicts))
        said = _outcome(lambda: adapters.promote(self.store, verdict, by_whom="x", person=person))
        assert said == self._expected(verdict, person)
        if said == "moved":
            self._move("promote", verdict.version)

    @precondition(lambda self: self.count)
    @rule(data=st.data())
    def roll_back(self, data: st.DataObject) -> None:
        to = data.draw(st.none() | st.integers(1, self.count + 1))
        target, champion = to or self.named.get("previous"), self.named.get("champion")
        said = _outcome(lambda: adapters.roll_back(self.store, "m", by_whom="x", to=to))
        if champion is None or target is None or target > self.count:
            assert said == "NotFound"
        elif target == champion:
            assert said == "Conflict"
        else:
            assert said == "moved"
            self.rolled_back.add(champion)
            self._move("rollback", target)

    @invariant()
    def the_store_says_what_the_model_says(self) -> None:
        if not hasattr(self, "named"):
            return
        assert adapters.aliases(self.store, "m") == self.named
        moves = [(each.kind, each.from_version, each.version) for each in adapters.promotions(self.store, "m")]
        assert moves == self.moves
        assert {each.version for each in adapters.versions(self.store) if each.rolled_back} == self.rolled_back
        told = [event.type for event in read(self.store) if event.type in ("adapter.promoted", "adapter.rolled_back")]
        assert len(told) == len(moves)

    def _expected(self, verdict: adapters.Verdict, person: bool) -> str:
        champion = self.named.get("champion")
        if not person and (verdict.outcome != "pass" or verdict.version in self.rolled_back):
            return "GateClosed"
        if champion == verdict.version or (not person and champion != verdict.body["champion"]):
            return "Conflict"
        return "moved"

    def _move(self, kind: str, version: int) -> None:
        before = self.named.get("champion")
        self.moves.append((kind, before, version))
        self.named["champion"] = version
        if before is not None:
            self.named["previous"] = before


TestAliases: Any = AliasMachine.TestCase
TestAliases.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)

"""The reaper against a scripted cloud: what is ended, what is never touched, what is kept in the ledger."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.pod_reaper import Reaper
from jobs.reap_decision import Act, Look, decide
from registry import ledger, runs
from registry.budgets import RentedPod
from registry.cloud_terms import Budgets
from registry.errors import BudgetError, CloudError
from registry.events import read
from registry.ledger import Intent
from registry.project import Project
from registry.rentals import Rental, State, get, installation, pod_name, rented_pods
from registry.runpod_api import RunPod
from registry.runpod_shapes import Pod, PodOrder
from registry.spending import job_usd
from registry.store import Store
from tests.conftest import run_bounded, started
from tests.fakes.runpod.started import standin
from tests.fakes.scripted_cloud import ScriptedCloud

BUDGETS = Budgets(run_usd=5)


def a_run(store: Store, recipe: str = "tickets") -> str:
    body = {"name": recipe, "model": recipe}
    return runs.submit(store, body, "recipes/tickets.yaml", "digest", queue=True).id


def live(store: Store, cloud: ScriptedCloud, job: str = "", usd: float | None = None) -> Rental:
    """A rental whose pod is there, of a run that is on."""
    job = job or a_run(store)
    intent = Intent(job, "tickets", "support", "NVIDIA A40", "secure", 0.5, reserved_usd=usd)
    rental = ledger.intend(store, intent, BUDGETS)
    pod = cloud.start(rental.name)
    found = ledger.note_live(store, rental.name, pod.id, 0.5)
    assert found is not None
    return found


def reaper(store: Store, cloud: ScriptedCloud, settle: float = 0.0, final: float = 0.0) -> Reaper:
    return Reaper(store, cloud, BUDGETS, settle, final)


def until(condition: Callable[[], object], act: Callable[[], object], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        act()
        time.sleep(0.01)


def test_what_nobody_wants_is_ended_and_nothing_else(store: Store) -> None:
    cloud, ours = ScriptedCloud(), installation(store)
    wanted = live(store, cloud)
    orphan = cloud.start(f"ft-{ours}-tickets-0000000000-a7")
    strange = [f"ft-{ours}x-tickets-a1", "ft-ffffff-tickets-a1", f"xft-{ours}-tickets-a1", f"ft-{ours}-tickets",
               f"ft-{ours}-tickets-a", f"ft-{ours}-tickets-a1 ", "my pod", f"FT-{ours}-tickets-a1"]  # fmt: skip
    others = [cloud.start(name) for name in strange]
    reaper(store, cloud).look()
    assert set(cloud.living) == {wanted.pod, *(each.id for each in others)}
    assert [each.data for each in read(store, type_="pod.reaped")] == [
        {"pod": orphan.id, "reason": "the ledger knows no such rental"}
    ]
    assert orphan.id in {each.pod for each in rented_pods(store)}, "it cost something"


def test_a_pod_that_comes_between_the_list_and_the_ledger_stays(store: Store) -> None:
    cloud = ScriptedCloud()

    def meanwhile(verb: str) -> None:
        if verb == "pods":
            live(store, cloud)

    cloud.before = meanwhile
    reaper(store, cloud).look()
    assert len(cloud.living) == 1


@pytest.mark.parametrize("state", ["succeeded", "failed", "cancelled", "refused", "paused"])
def test_the_pod_of_a_run_that_is_over_is_ended(store: Store, state: str) -> None:
    cloud = ScriptedCloud()
    rental, look = live(store, cloud), reaper(store, cloud)
    look.look()
    assert cloud.living
    store.note("UPDATE runs SET state = ? WHERE id = ?", (state, rental.job))
    look.look()
    look.look()
    assert not cloud.living
    assert (get(store, rental.name).state, get(store, rental.name).reason) == ("ended", "its run has ended")


def test_a_pod_that_outlives_what_was_reserved_is_ended_also_when_there_is_no_list(store: Store) -> None:
    cloud = ScriptedCloud()
    rental = live(store, cloud, usd=0.5)
    look = reaper(store, cloud)
    store.note("UPDATE rentals SET created = ? WHERE name = ?", (time.time() - 3590, rental.name))
    look.look()
    assert cloud.living, "half a dollar at half a dollar an hour is an hour"
    store.note("UPDATE rentals SET created = ? WHERE name = ?", (time.time() - 3601, rental.name))
    cloud.faults["pods"] = [CloudError("502")]
    look.look()
    assert not cloud.living
    assert get(store, rental.name).reason == "what was reserved for it is used up"


def test_a_pod_that_ended_by_itself_is_noticed_once_the_list_cannot_lag(store: Store) -> None:
    cloud = ScriptedCloud(lag=0.2)
    rental, look = live(store, cloud), reaper(store, cloud, settle=0.4)
    for _ in range(5):
        look.look()
    assert get(store, rental.name).state == "live", "not listed yet"
    cloud.end(str(rental.pod))
    until(lambda: get(store, rental.name).state == "ended", look.look)
    ended = read(store, type_="pod.ended")[0]
    assert (ended.subject, ended.data["reason"], ended.data["pod"]) == (
        rental.job, "the pod ended by itself", rental.pod,
    )  # fmt: skip


def test_a_second_pod_of_a_name_is_ended_and_the_one_of_the_ledger_stays(store: Store) -> None:
    cloud = ScriptedCloud()
    older = cloud.start(pod_name(store, "job", 1))
    rental = live(store, cloud, "job")
    reaper(store, cloud).look()
    assert list(cloud.living) == [rental.pod]
    assert [each.data["pod"] for each in read(store, type_="pod.reaped")] == [older.id]


def test_ending_is_tried_for_ever_and_said_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.pod_reaper.LONGEST_PAUSE", 0.0)
    cloud = ScriptedCloud(faults={"terminate": [CloudError("500")] * 12})
    rental, look = live(store, cloud), reaper(store, cloud)
    ledger.want_ended(store, rental.name, "done")
    for _ in range(12):
        look.look()
    assert cloud.living
    assert get(store, rental.name).body["failures"] == 12
    assert [each.data["attempts"] for each in read(store, type_="pod.stuck", subject=rental.name)] == [3]
    look.look()
    assert not cloud.living
    look.look()
    assert get(store, rental.name).state == "ended"


def test_a_yes_that_is_a_lie_is_found_out(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.pod_reaper.LONGEST_PAUSE", 0.0)
    cloud = ScriptedCloud(linger=0.4)
    rental, look = live(store, cloud), reaper(store, cloud, settle=0.1)
    ledger.want_ended(store, rental.name, "done")
    until(lambda: get(store, rental.name).state == "ended", look.look)
    ends = [each for each in cloud.calls if each.startswith("terminate")]
    assert 2 <= len(ends) <= 6, "again after the list had time, and not at every look"


def test_a_pod_that_the_list_shows_after_its_end_is_not_reaped(store: Store) -> None:
    cloud = ScriptedCloud(linger=5.0)
    rental, look = live(store, cloud), reaper(store, cloud, settle=5.0)
    ledger.want_ended(store, rental.name, "done")
    look.look()
    look.look()
    assert cloud.calls.count(f"terminate {rental.pod}") == 1
    assert get(store, rental.name).state == "ending", "until the list shows it no more"


def look_of(rental: Rental, pods: list[Pod] | None, *, wants: bool = True, quiet: float = 1e9) -> Look:
    rented = {each.id: RentedPod(each.id, each.name, 0.5, 0.0, None, None, False) for each in pods or []}
    return Look(1e6, 60.0, pods, {rental.name: rental}, rented, {}, lambda _: wants, lambda _: quiet)


def pod(id_: str, created: float | None = None, name: str = "n") -> Pod:
    return Pod(id_, name, "RUNNING", "NVIDIA A40", "secure", 0.5, created, None, None)


def rental_of(state: State, pod_: str | None = None) -> Rental:
    return Rental(
        "n", "j", 1, "r", "m", state, "NVIDIA A40", "secure", pod_, 0.5, 5.0, 0.0, 0.0, None, "why",
        {"cap_usd": 5, "touched": "t"},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("rental", "pods", "wants", "quiet", "acts"),
    [
        ("intended", [], True, 100.0, []),
        ("intended", [], True, 1e9, [("void", "")]),
        ("intended", ["a"], True, 100.0, []),
        ("intended", ["a"], True, 1e9, [("adopt", "a")]),
        ("intended", ["b", "a"], True, 1e9, [("adopt", "b")]),
        ("intended", None, True, 1e9, []),
        ("intended", ["a"], False, 0.0, [("want_ended", "")]),
        ("live", ["a"], True, 1e9, []),
        ("live", ["a", "b"], True, 0.0, [("reap", "b")]),
        ("live", ["a"], False, 0.0, [("want_ended", "a")]),
        ("live", [], True, 1e9, [("close", "a")]),
        ("ending", ["a"], True, 0.0, [("end", "a")]),
        ("ending", ["a", "b"], True, 0.0, [("end", "a"), ("end", "b")]),
        ("ending", [], True, 0.0, [("close", "a")]),
        ("ending", None, True, 1e9, []),
        ("ended", ["a"], True, 0.0, [("reap", "a")]),
        ("void", ["b"], True, 0.0, [("reap", "b")]),
    ],
)
def test_what_is_decided(
    rental: State, pods: list[str] | None, wants: bool, quiet: float, acts: list[tuple[str, str]]
) -> None:
    listed = None if pods is None else [pod(each, float(number)) for number, each in enumerate(pods)]
    found = decide(look_of(rental_of(rental, None if rental == "intended" else "a"), listed, wants=wants, quiet=quiet))
    assert [(each.kind, each.pod) for each in found] == acts


def test_an_ending_rental_whose_create_was_lost_waits_for_the_list() -> None:
    none = rental_of("ending")
    assert decide(look_of(none, [], quiet=59)) == []
    assert decide(look_of(none, [], quiet=61)) == [Act("close", "n", "", "")]


def test_the_bill_counts_and_is_final_some_time_after_the_end(store: Store) -> None:
    cloud = ScriptedCloud()
    rental, look = live(store, cloud), reaper(store, cloud, final=0.2)
    cloud.bill[str(rental.pod)] = 0.75
    look.bill(at_once=True)
    assert job_usd(store, rental.job, time.time()) == 0.75, "more than was measured"
    ledger.note_gone(store, str(rental.pod), time.time() + 3600)
    assert job_usd(store, rental.job, time.time()) == 0.75
    store.note("UPDATE rented_pods SET ended = ?", (time.time() - 1,))
    cloud.bill[str(rental.pod)] = 0.01
    look.bill(at_once=True)
    cloud.bill[str(rental.pod)] = 9.0
    look.bill(at_once=True)
    assert [(each.billed_usd, each.final) for each in rented_pods(store)] == [(0.01, True)]


def test_a_pod_of_ours_that_only_the_bill_knows_gets_its_row(store: Store) -> None:
    cloud = ScriptedCloud()
    live(store, cloud)
    unseen, foreign = cloud.start(pod_name(store, "tickets", 9)), cloud.start("somebody else's")
    cloud.bill |= {unseen.id: 0.1, foreign.id: 0.2}
    look = reaper(store, cloud)
    look.bill(at_once=True)
    look.bill(at_once=True)
    assert {each.pod for each in rented_pods(store)} == {"pod1", unseen.id}
    assert cloud.calls.count("pod") == 2, "the other one is not asked for again"


def test_what_endpoints_cost_counts_in_the_month(store: Store) -> None:
    store.note(
        "INSERT INTO endpoints (id, name, model, version, created, body) VALUES ('e1', 'e', 'm', 1, ?, '{}')",
        (time.time() - 1,),
    )
    cloud, month = ScriptedCloud(endpoint_bill={"e1": 4.5, "other": 9.0}), Budgets(run_usd=5, month_usd=9)
    reaper(store, cloud).bill(at_once=True)
    with pytest.raises(BudgetError, match="month"):
        ledger.intend(store, Intent("job", "r", "m", "NVIDIA A40", "secure", 0.5), month)


def test_it_goes_on_whatever_happens(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    class Enough(Exception):
        pass

    cloud = ScriptedCloud(faults={"pods": [RuntimeError("a defect"), RuntimeError("a defect"), CloudError("502")]})
    orphan, looks = cloud.start(pod_name(store, "tickets", 1)), []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 4:
            raise Enough

    with pytest.raises(Enough):
        reaper(store, cloud).run(sleep)
    assert orphan.id in cloud.gone
    assert capsys.readouterr().err.splitlines() == ["pods: RuntimeError: a defect", "pods: 502"]


def test_a_dry_run_changes_nothing(store: Store) -> None:
    cloud = ScriptedCloud()
    orphan = cloud.start(pod_name(store, "tickets", 1))
    acts = reaper(store, cloud).look(dry_run=True)
    assert [(each.kind, each.pod) for each in acts] == [("reap", orphan.id)]
    assert (list(cloud.living), rented_pods(store), cloud.calls) == ([orphan.id], [], ["pods"])


def test_a_pod_that_is_listed_as_terminated_is_on_the_books(store: Store) -> None:
    cloud = ScriptedCloud()
    dead = cloud.start(pod_name(store, "tickets", 1))
    cloud.living[dead.id] = replace(dead, status="TERMINATED", usd_per_hour=0.0)
    reaper(store, cloud).look()
    assert [each.pod for each in rented_pods(store)] == [dead.id]
    assert "terminate" not in " ".join(cloud.calls)


SLEEP = f"{sys.executable} -c 'import time; time.sleep(600)'"


def test_a_worker_stays_until_what_is_rented_is_really_gone(project: Project, store: Store, tmp_path: Path) -> None:
    """Its reaper is the one who tries again and again."""
    refusals = {"fault": "error", "match": "DELETE *", "times": 3}
    with standin(tmp_path / "runpod", rules=[refusals]) as cloud:
        intent = Intent("job", "tickets", "support", "NVIDIA A40", "secure", 0.5)
        rental = ledger.intend(store, intent, BUDGETS)
        with RunPod(cloud.url, cloud.key) as runpod:
            made = runpod.create(PodOrder(rental.name, "ft", "NVIDIA A40", "secure", {}, SLEEP, 20))
        ledger.note_live(store, rental.name, made.id, made.usd_per_hour)
        ledger.want_ended(store, rental.name, "its job is done")
        environment = {**cloud.environment, "FT_WORKER_IDLE_SECONDS": "0.5", "FT_SETTLE_SECONDS": "1"}
        done = run_bounded([sys.executable, "-m", "jobs.worker"], 120, env=environment, cwd=project.root)
        assert done.returncode == 0, done.stderr
        assert not cloud.alive()
    assert get(store, rental.name).state == "ended"


RENT = """
import sys
from jobs.rent import Offer, Wish, rent
from registry.cloud_terms import Budgets
from registry.project import find_project
from registry.runpod_api import open_runpod
from registry.runpod_shapes import PodOrder
from registry.settings import load_settings
from registry.store import open_store

project = find_project()
wish = Wish(sys.argv[1], "tickets", "m", (Offer("NVIDIA A40", "secure", 0.4),), Budgets(run_usd=5), 2.0)
order = lambda rental: PodOrder(rental.name, "ft", rental.gpu, rental.cloud, {}, sys.argv[2], 20)
with open_runpod(load_settings(project)) as cloud:
    print(rent(open_store(project), cloud, wish, order, settle_seconds=1.5).pod)
"""


@pytest.mark.parametrize("fault", ["timeout", "timeout_after"])
def test_killed_while_runpod_creates_it_finds_the_pod_or_makes_one(
    project: Project, store: Store, tmp_path: Path, fault: str
) -> None:
    """A real process, kill -9; its create was done or not, nobody was told."""
    job = a_run(store)
    command = [sys.executable, "-c", RENT, job, SLEEP]
    slow = {"fault": fault, "match": "POST /v2/pods", "times": 1, "seconds": 30}
    with standin(tmp_path / "runpod", rules=[slow]) as cloud:
        with started(command, env=cloud.environment, cwd=project.root) as process:
            cloud.until(lambda truth: any(each["fired"] for each in truth["faults"]), 40)
            process.kill()
        cloud.faults()
        done = run_bounded(command, 60, env=cloud.environment, cwd=project.root)
        assert done.returncode == 0, done.stderr
        with RunPod(cloud.url, cloud.key) as runpod:
            reaper_ = Reaper(store, runpod, BUDGETS, 0.5)
            for _ in range(3):
                reaper_.look()
                time.sleep(0.5)
        alive = cloud.alive()
    assert [each["id"] for each in alive] == [done.stdout.strip()]
    expected = 1 if fault == "timeout_after" else 2
    assert alive[0]["name"] == pod_name(store, job, expected)

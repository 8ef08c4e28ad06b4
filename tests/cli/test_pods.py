"""`ft pods` and `ft pods reap`, with the stand-in for RunPod and without any."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from registry import ledger, runs
from registry.cloud_terms import Budgets
from registry.events import read
from registry.ledger import Intent
from registry.project import Project
from registry.rentals import Rental, get, installation, pod_name, rented_pods
from registry.runpod_api import RunPod
from registry.runpod_shapes import Pod, PodOrder
from registry.store import Store
from tests.conftest import run_bounded, started
from tests.fakes.runpod.started import Standin, standin

SLEEP = f"{sys.executable} -c 'import time; time.sleep(600)'"


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Standin]:
    with standin(tmp_path / "runpod") as running:
        yield running


def ft(project: Project, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_bounded([sys.executable, "-m", "cli.main", *arguments], 60, cwd=project.root, env=environment)


def a_pod(cloud: Standin, name: str) -> Pod:
    with RunPod(cloud.url, cloud.key) as runpod:
        return runpod.create(PodOrder(name, "ft", "NVIDIA A40", "secure", {}, SLEEP, 20))


def a_rental(store: Store, cloud: Standin) -> Rental:
    intent = Intent("tickets-1", "tickets", "support", "NVIDIA A40", "secure", 0.4, disk_gb=20)
    rental = ledger.intend(store, intent, Budgets(run_usd=5))
    pod = a_pod(cloud, rental.name)
    found = ledger.note_live(store, rental.name, pod.id, pod.usd_per_hour)
    assert found is not None
    return found


def test_pods_are_shown_as_both_sides_know_them_and_strangers_only_counted(
    project: Project, store: Store, cloud: Standin
) -> None:
    rental, foreign = a_rental(store, cloud), a_pod(cloud, "somebody-elses")
    shown = ft(project, "pods", **cloud.environment)
    assert shown.returncode == 0, shown.stderr
    assert rental.name in shown.stdout
    assert "live" in shown.stdout
    assert " of $5.00" in shown.stdout
    assert foreign.name not in shown.stdout
    assert "1 more in the account that ft did not make" in shown.stdout
    assert foreign.name in ft(project, "pods", "--all", **cloud.environment).stdout
    told = json.loads(ft(project, "pods", "--json", **cloud.environment).stdout)
    line = told["pods"][0]
    assert (line["pod"], line["run"], line["ledger"], told["foreign"], told["others"]) == (
        rental.pod, "tickets-1", "live", 1, [],
    )  # fmt: skip
    assert line["runpod"] in ("provisioning", "starting", "running")
    assert line["permit_until"] > time.time() + 3600


def test_without_a_key_the_ledger_is_shown(project: Project, store: Store, cloud: Standin) -> None:
    rental = a_rental(store, cloud)
    shown = ft(project, "pods")
    assert shown.returncode == 0, shown.stderr
    assert rental.name in shown.stdout
    assert "what RunPod has is not known" in shown.stderr
    assert ft(project, "pods", "reap").returncode == 1


def test_a_run_that_is_on_may_cost_more(project: Project, store: Store, cloud: Standin) -> None:
    with store.writing() as connection:
        runs.submit_within(connection, "tickets-1", {"name": "tickets", "model": "support"}, "recipes/t.yaml", "d")
    assert "has no pod" in ft(project, "pods", "extend", "tickets-1", "--max-usd", "9", **cloud.environment).stderr
    rental = a_rental(store, cloud)
    done = ft(project, "pods", "extend", "tickets-1", "--max-usd", "9", "--json", **cloud.environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["reserved_usd"] > rental.reserved_usd
    assert get(store, rental.name).reserved_usd == json.loads(done.stdout)["reserved_usd"]


def test_reap_ends_what_nobody_wants_and_touches_nothing_else(project: Project, store: Store, cloud: Standin) -> None:
    rental, foreign = a_rental(store, cloud), a_pod(cloud, "ft-ffffff-tickets-1-a1")
    orphan = a_pod(cloud, f"ft-{installation(store)}-tickets-9-a1")
    dry = ft(project, "pods", "reap", "--dry-run", **cloud.environment)
    assert f"{orphan.name} ({orphan.id}): would be ended: the ledger knows no such rental" in dry.stdout
    assert len(cloud.alive()) == 3
    assert "not wanted" in ft(project, "pods", **cloud.environment).stdout
    done = ft(project, "pods", "reap", "--json", **cloud.environment)
    assert [each["pod"] for each in json.loads(done.stdout)["acts"]] == [orphan.id]
    assert {each["id"] for each in cloud.alive()} == {rental.pod, foreign.id}
    assert "all that is rented is wanted" in ft(project, "pods", "reap", **cloud.environment).stdout


def test_the_reaper_alone_ends_pods_however_runpod_behaves(project: Project, store: Store, cloud: Standin) -> None:
    """`python -m jobs.pod_reaper`, through answers lost, refusals, and a list that lags."""
    rental = a_rental(store, cloud)
    orphan = a_pod(cloud, pod_name(store, "tickets-9", 1))
    cloud.faults(
        {"fault": "error", "match": "GET /v2/pods", "times": 2},
        {"fault": "error_after", "match": "DELETE *", "times": 1},
        {"fault": "list_lag", "seconds": 0.3},
    )
    environment = {**cloud.environment, "FT_SETTLE_SECONDS": "1"}
    with started([sys.executable, "-m", "jobs.pod_reaper"], env=environment, cwd=project.root):
        cloud.until(lambda truth: [each["id"] for each in truth["pods"] if each["alive"]] == [rental.pod], 40)
        ledger.want_ended(store, rental.name, "its job is done")
        cloud.until(lambda truth: not any(each["alive"] for each in truth["pods"]), 40)
        end = time.monotonic() + 40
        while get(store, rental.name).state != "ended":
            assert time.monotonic() < end
            time.sleep(0.1)
    assert {each.pod for each in rented_pods(store)} == {rental.pod, orphan.id}
    assert [each.subject for each in read(store, type_="pod.reaped")] == [orphan.name]
    assert [each.data["reason"] for each in read(store, type_="pod.ended")] == ["its job is done"]

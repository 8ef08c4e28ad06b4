"""One contract for every target: launch, poll, fetch, cancel, each as often as one likes, and a trainer that dies."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jobs.rent import Offer
from jobs.targets.bucket_card import BucketCard
from jobs.targets.local_card import LocalCard
from jobs.targets.runpod_pod import Rent, RunPodPod
from jobs.targets.target import Target
from registry import rentals
from registry.base_models import BaseModel
from registry.bucket import open_bucket
from registry.cards import pick_card
from registry.cloud_terms import CloudTerms
from registry.job_bucket import JobBucket
from registry.job_folder import JobFolder
from registry.manifest import broken_files, manifest_digest, write_manifest
from registry.project import Project
from registry.recipe import Finetune
from registry.runpod_api import open_runpod
from registry.store import Store
from tests.dvc_projects import write_splits
from tests.fakes.adapter_folder import lora_arrays, make_adapter
from tests.fakes.runpod.started import Standin, standin
from tests.weed_server import WeedServer

GPU = "NVIDIA A40"
STEPS = 120


@dataclass
class Place:
    """A target, with a job for it; `kill` ends its trainer without a word, `alive` counts trainers or pods."""

    target: Target
    job: JobFolder
    kill: Callable[[], None]
    alive: Callable[[], int]

    def until(self, state: str, seconds: float = 90) -> Any:
        end = time.monotonic() + seconds
        while (found := self.target.poll(self.job.path)).state != state:
            assert time.monotonic() < end, (found, self.job.log.read_text() if self.job.log.exists() else "")
            time.sleep(0.1)
        return found

    def until_step(self, step: int, seconds: float = 90) -> None:
        end = time.monotonic() + seconds
        while max((line.get("step", 0) for line in self.job.progress()), default=0) < step:
            assert time.monotonic() < end, self.job.log.read_text() if self.job.log.exists() else "no log"
            self.target.poll(self.job.path)
            time.sleep(0.1)


@pytest.fixture
def base(project: Project, tmp_path: Path) -> BaseModel:
    """A base model that nobody loads, in a cache that is not the person's: `ft doctor` once listed it there."""
    project.models.unlink()
    folder = project.models / "local-none@1"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    write_manifest(folder, source="none", revision="1", licence="Apache-2.0")
    return BaseModel("none", "1", "Apache-2.0", manifest_digest(folder), folder.name)


@pytest.fixture
def steps() -> int:
    return STEPS


@pytest.fixture
def job(project: Project, base: BaseModel, steps: int) -> JobFolder:
    recipe = Finetune.model_validate({
        "kind": "finetune", "name": "m", "model": "m", "base": {"model": "./none"}, "data": {"path": "datasets/t"},
        "train": {"max_steps": steps, "checkpoint_steps": 2}, "evaluate": {"task": "text"},
    })  # fmt: skip
    made = JobFolder(project.job_folder("m-0123456789"))
    made.write_spec(
        {"job": made.name, "recipe": recipe.model_dump(mode="json"), "base": base.as_dict(), "dataset": "d"}
    )
    write_splits(made.data)
    return made


@pytest.fixture
def trainer(tmp_path: Path, base: BaseModel) -> str:
    """The command of a trainer without torch; the folder comes behind it."""
    make_adapter(tmp_path / "made", lora_arrays(size=16), base=base.digest)
    (tmp_path / "made" / "fingerprint.json").write_text("{}", encoding="utf-8")
    return f"{shlex.quote(sys.executable)} -m tests.flows.torch_free_trainer {shlex.quote(str(tmp_path / 'made'))}"


@pytest.fixture(params=["local card", "bucket card", "runpod pod"])
def place(request: pytest.FixtureRequest, project: Project, store: Store, job: JobFolder, trainer: str,
          tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:  # fmt: skip
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    with ExitStack() as stack:
        if request.param == "local card":
            yield _on_card(project, job, trainer, tmp_path)
        elif request.param == "bucket card":
            yield stack.enter_context(_on_lent_card(project, job, trainer, tmp_path, request.getfixturevalue("s3")))
        else:
            cloud = stack.enter_context(standin(tmp_path / "cloud", provision=0.1, start=0.1, grace=5))
            yield stack.enter_context(
                _in_pod(store, job, trainer, cloud, request.getfixturevalue("s3"), _rent(project))
            )


def _python(trainer: str, tmp_path: Path) -> str:
    """What takes `-m jobs.trainer FOLDER` as a Python does, and starts that trainer."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nshift 2\nexec {trainer} "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    return str(python)


@contextmanager
def _on_lent_card(
    project: Project, job: JobFolder, trainer: str, tmp_path: Path, s3: WeedServer
) -> Iterator[Place]:  # fmt: skip
    """The host has an empty folder and an empty cache; the job was made, and sent to the bucket, elsewhere."""
    settings = s3.settings(f"lent/{tmp_path.name}", trainer_python=_python(trainer, tmp_path))
    with closing(open_bucket(settings)) as bucket:
        remote = JobBucket(bucket, job.name)
        remote.push(job, project.models / "local-none@1")
        shutil.rmtree(job.path)
        shutil.rmtree(project.models)

        def kill() -> None:
            held = remote.lease()
            assert held is not None
            os.kill(held.lease.pid, signal.SIGKILL)

        target = BucketCard(project, pick_card("cpu"), bucket, settings, stop_seconds=20)
        yield Place(target, job, kill, lambda: int(target.poll(job.path).state == "running"))


def _on_card(project: Project, job: JobFolder, trainer: str, tmp_path: Path) -> Place:
    target = LocalCard(project, pick_card("cpu"), _python(trainer, tmp_path), stop_seconds=20)

    def kill() -> None:
        held = job.lease()
        assert held is not None
        os.kill(held.lease.pid, signal.SIGKILL)

    return Place(target, job, kill, lambda: int(target.poll(job.path).state == "running"))


def _rent(project: Project, **more: Any) -> Rent:
    offer = Offer(GPU, "secure", more.pop("usd_per_hour", 0.4))
    return Rent("m", "m", more.pop("terms", CloudTerms()), (offer,), base=project.models / "local-none@1", **more)


@contextmanager
def _in_pod(
    store: Store, job: JobFolder, trainer: str, cloud: Standin, s3: WeedServer, rent: Rent
) -> Iterator[Place]:  # fmt: skip
    settings = s3.settings(
        job.path.parents[2].name, runpod_url=cloud.url, runpod_api_key=cloud.key, runpod_image="ft", settle_seconds=1,
        pod_start_seconds=60, budgets={"run_usd": 5},
    )  # fmt: skip

    def kill() -> None:
        cloud.fate(cloud.alive()[0]["id"], "die")

    command = f"env FT_TRAINER={shlex.quote(trainer)} python -m jobs.pod"
    with open_runpod(settings) as client, closing(open_bucket(settings)) as bucket:
        target = RunPodPod(store, settings, client, bucket, rent, command)
        yield Place(target, job, kill, lambda: len(cloud.alive()))


def test_launched_twice_it_trains_once_and_its_adapter_is_fetched_whole(place: Place, tmp_path: Path) -> None:
    folder = place.job.path
    assert place.target.launch(folder)
    place.until("running")
    assert not place.target.launch(folder)
    done = place.until("done")
    assert (done.result["status"], done.result.get("steps")) == ("ok", STEPS), done.result
    assert not place.target.launch(folder)
    for _ in range(2):
        place.target.fetch(folder, tmp_path / "fetched")
        assert broken_files(tmp_path / "fetched") == []
    assert place.target.poll(folder).result == done.result
    _gone(place)


def test_asked_to_stop_it_saves_a_checkpoint_and_goes_on_from_there_when_launched_again(place: Place) -> None:
    folder = place.job.path
    place.target.launch(folder)
    place.until_step(4)
    place.target.cancel(folder, "the run was paused")
    place.target.cancel(folder, "the run was paused")
    stopped = place.job.result()
    assert stopped is not None
    assert (stopped["status"], stopped["message"]) == ("stopped", "the run was paused")
    _gone(place)
    assert place.target.launch(folder)
    done = _ok(place)
    assert done["steps"] == STEPS
    assert _first_steps(place.job)[-1] >= stopped["steps"], "the checkpoint of the stop is there"


def test_a_trainer_that_dies_is_lost_and_the_next_goes_on_from_its_checkpoint(place: Place) -> None:
    folder = place.job.path
    place.target.launch(folder)
    place.until_step(6)
    place.kill()
    place.until("lost")
    _gone(place)
    assert place.target.launch(folder)
    assert _ok(place)["steps"] == STEPS
    assert _first_steps(place.job)[-1] >= 2


def _ok(place: Place) -> dict[str, Any]:
    """The result of a job that had another one before."""
    end = time.monotonic() + 90
    while True:
        found = place.target.poll(place.job.path)
        if found.result and found.result["status"] == "ok":
            return found.result
        assert time.monotonic() < end, found
        time.sleep(0.1)


def _gone(place: Place) -> None:
    end = time.monotonic() + 20
    while place.alive():
        assert time.monotonic() < end, "something is still at work"
        time.sleep(0.1)


def _first_steps(job: JobFolder) -> list[int]:
    """The step at which each trainer began."""
    found: dict[int, int] = {}
    for line in job.progress():
        if "step" in line:
            found.setdefault(line["epoch"], line["step"])
    return [found[epoch] for epoch in sorted(found)]


@pytest.mark.parametrize("steps", [1200])
def test_a_trainer_that_works_but_slower_than_its_plan_gets_what_the_run_has_left(
    steps: int, project: Project, store: Store, job: JobFolder, trainer: str, s3: WeedServer, tmp_path: Path
) -> None:
    # 40 dollars an hour: 0.45 dollars pay for 40 s, and the 1200 steps take more than 60.
    rent = _rent(project, terms=CloudTerms(max_usd_per_hour=50), usd_per_hour=40.0, reserve_usd=0.45, max_usd=4.0)
    with (
        standin(tmp_path / "cloud", provision=0.1, start=0.1, grace=5, price_factor=100) as cloud,
        _in_pod(store, job, trainer, cloud, s3, rent) as place,
    ):
        place.target.launch(job.path)
        done = place.until("done", seconds=200)
        assert (done.result["status"], done.result["steps"]) == ("ok", steps)
        assert [each.reserved_usd for each in rentals.rentals(store)] == [pytest.approx(4.0)]


def test_a_pod_that_was_made_twice_is_on_the_books_though_no_list_was_read(
    project: Project, store: Store, job: JobFolder, trainer: str, s3: WeedServer, tmp_path: Path
) -> None:
    twice: dict[str, Any] = {"fault": "duplicate", "match": "POST /v2/pods", "times": 1}
    with (
        standin(tmp_path / "cloud", rules=[twice], provision=0.1, start=0.1, grace=5) as cloud,
        _in_pod(store, job, trainer, cloud, s3, _rent(project)) as place,
    ):
        place.target.launch(job.path)
        place.until("done")
        cloud.until(lambda truth: not any(each["alive"] for each in truth["pods"]), seconds=120)
        place.target.fetch(job.path, tmp_path / "fetched")
        made = {each["id"] for each in cloud.truth()["pods"]}
        assert len(made) == 2
        assert {each.pod for each in rentals.rented_pods(store)} == made


@pytest.mark.parametrize("steps", [2000])
def test_a_pod_ends_with_its_permit_whoever_is_dead_here(
    steps: int, project: Project, store: Store, job: JobFolder, trainer: str, s3: WeedServer, tmp_path: Path
) -> None:
    # 40 dollars an hour: 0.45 dollars pay for 40 s.
    rent = _rent(project, terms=CloudTerms(max_usd_per_hour=50), usd_per_hour=40.0, reserve_usd=0.45)
    with (
        standin(tmp_path / "cloud", provision=0.1, start=0.1, grace=5, price_factor=100) as cloud,
        _in_pod(store, job, trainer, cloud, s3, rent) as place,
    ):
        assert isinstance(place.target, RunPodPod)
        place.target.launch(job.path)
        found = JobBucket(place.target.bucket, job.name).permit()
        assert found is not None
        assert 20 < found[0].until - found[1] < 40
        cloud.until(lambda truth: not any(each["alive"] for each in truth["pods"]), seconds=90)
        assert cloud.truth()["pods"][0]["usd"] <= 0.45 + 60 * 40 / 3600
        assert rentals.current(store, job.name) is not None  # nobody has looked at it here
        assert place.until("done").result["status"] == "stopped"

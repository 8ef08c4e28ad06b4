"""Target local card: launch, poll, fetch, cancel, each as often as one likes, around a real trainer."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from jobs.targets.local_card import LocalCard, _started
from jobs.targets.target import Poll
from registry.cards import holder, pick_card, try_lock
from registry.job_folder import JobFolder, Lease
from registry.manifest import broken_files
from registry.project import Project
from tests.conftest import TinyBase, started
from tests.jobs.test_trainer import Job, make_job

CPU = pick_card("cpu")


@pytest.fixture
def own(project: Project, tiny_base: TinyBase, tmp_path: Path) -> Project:
    """The project, with the tiny base in its cache."""
    cache = tmp_path / "tiny cache"
    cache.mkdir()
    (cache / "models").symlink_to(tiny_base.cache / "models", target_is_directory=True)
    return Project(project.root, project.home, cache)


@pytest.fixture
def card(own: Project, monkeypatch: pytest.MonkeyPatch) -> LocalCard:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    return LocalCard(own, CPU)


def until(condition: Callable[[], bool], seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not come about in time"
        time.sleep(0.05)


def pid_of(job: Job) -> int:
    until(lambda: job.folder.lease() is not None)
    held = job.folder.lease()
    assert held is not None
    return held.lease.pid


def test_a_card_that_another_holds_is_waited_for(own: Project, card: LocalCard, tmp_path: Path) -> None:
    job = JobFolder(tmp_path / "job")
    job.write_spec({})
    lock = try_lock(own, CPU, "somebody's engine")
    assert lock is not None
    card.launch(job.path)
    assert card.poll(job.path) == Poll("waiting", note="card cpu is held by somebody's engine")
    lock.release()
    assert card.poll(job.path).state == "waiting"
    assert job.lease() is None


@pytest.mark.training
def test_a_trainer_is_launched_once_killed_lost_launched_again_and_fetched(
    own: Project, card: LocalCard, tiny_base: TinyBase, tmp_path: Path
) -> None:
    job = make_job(own.job_folder("tiny-1"), tiny_base.model, own.cache, max_steps=4)
    folder, target = job.folder.path, tmp_path / "adapters" / "1"
    target.parent.mkdir()
    card.launch(folder)
    card.launch(folder)
    assert card.poll(folder).state == "running"
    assert holder(own, CPU) == f"trainer of {folder}"
    os.kill(pid_of(job), signal.SIGKILL)
    until(lambda: card.poll(folder).state != "running")
    assert card.poll(folder).state == "lost"
    assert holder(own, CPU) == ""

    card.launch(folder)
    until(lambda: card.poll(folder).state == "done")
    last = card.poll(folder)
    assert last.result is not None
    assert (last.result["status"], last.result["steps"]) == ("ok", 4)
    lease = job.folder.lease()
    assert lease is not None
    assert lease.lease.epoch == 2
    card.launch(folder)  # done: nothing is started
    assert card.poll(folder).state == "done"
    assert job.folder.lease() == lease

    card.fetch(folder, target)
    assert broken_files(target) == []
    (target / "adapter_config.json").write_text("{}")
    card.fetch(folder, target)
    assert broken_files(target) == []
    assert [each.name for each in target.parent.iterdir()] == ["1"]


@pytest.mark.training
def test_cancel_returns_when_the_trainer_is_gone_with_its_checkpoint(
    own: Project, card: LocalCard, tiny_base: TinyBase
) -> None:
    job = make_job(own.job_folder("tiny-2"), tiny_base.model, own.cache, max_steps=4000, checkpoint_steps=1000)
    folder = job.folder.path
    card.launch(folder)
    until(lambda: max(job.steps(), default=0) >= 1)
    card.cancel(folder, "the run was cancelled")
    assert holder(own, CPU) == ""
    result = job.folder.result()
    assert result is not None
    assert (result["status"], result["message"]) == ("stopped", "the run was cancelled")
    assert len(job.folder.complete_checkpoints()) == 1
    assert job.folder.stop_reason() is None
    assert card.poll(folder).state == "done"
    card.cancel(folder, "again")  # nobody works: returns at once


@pytest.mark.training
def test_a_trainer_that_hangs_is_killed_and_nobody_elses_process_is(
    own: Project, card: LocalCard, tiny_base: TinyBase
) -> None:
    job = make_job(own.job_folder("tiny-3"), tiny_base.model, own.cache, max_steps=4000)
    hasty = LocalCard(own, CPU, stop_seconds=0.5)
    with started([sys.executable, "-c", "import time; time.sleep(300)"]) as bystander:
        stale = Lease(1, "a trainer that is gone", bystander.pid)  # its pid was given to another since
        (job.folder.path / "lease.json").write_text(json.dumps(asdict(stale)))
        hasty.launch(job.folder.path)
        [trainer] = [each for path, each in _started if path == job.folder.path]
        trainer.send_signal(signal.SIGSTOP)  # before it has claimed the job
        hasty.cancel(job.folder.path, "the run was cancelled")
        assert holder(own, CPU) == ""
        assert trainer.wait(10) == -signal.SIGKILL
        assert bystander.poll() is None
    assert job.folder.stop_reason() is None

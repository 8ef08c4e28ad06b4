"""Job folders: one trainer at a time, one result that counts, checkpoints that are whole. The races are real."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from registry.job_folder import Held, JobFolder, LeaseLost
from registry.manifest import write_manifest
from tests.conftest import all_at_once, started

LOOK = """
import pathlib
from registry.job_folder import JobFolder, LeaseLost
job = JobFolder(pathlib.Path())
seen = job.lease()
"""
CLAIM = """
try:
    print("won", job.claim("a trainer", seen).lease.epoch)
except LeaseLost:
    print("lost")
"""
# Stands still where it writes result.json: who opens a pipe waits for a reader.
PUBLISH = """
import os, sys
from pathlib import Path
from registry.job_folder import JobFolder
job = JobFolder(Path(sys.argv[1]))
os.mkfifo(job.path / f".result.json.{os.getpid()}.partial")
job.work.joinpath("adapter").mkdir(parents=True)
job.accept(job.claim("dies", job.lease()), {"status": "ok"}, job.work / "adapter")
"""


@pytest.fixture
def job(tmp_path: Path) -> JobFolder:
    folder = JobFolder(tmp_path / "job")
    folder.write_spec({"seed": 1})
    return folder


def checkpoint(job: JobFolder, epoch: int, step: int) -> Path:
    folder = job.checkpoints / f"{epoch:04d}-{step}"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(os.urandom(2000))
    (folder / "state.json").write_text(json.dumps({"step": step}))
    write_manifest(folder, step=step)
    return folder


def killed_while_publishing(job: JobFolder) -> Held:
    """The lease of a trainer that was killed when the lease had taken its result, and result.json was not there."""
    with started([sys.executable, "-c", PUBLISH, str(job.path)]) as process:
        while not ((held := job.lease()) and held.lease.owner == "dies" and held.lease.result and job.adapter.exists()):
            assert process.poll() is None, process.communicate()
        process.kill()
        process.wait(30)
    return held


def test_the_spec_is_written_once(job: JobFolder) -> None:
    job.write_spec({"seed": 1})
    with pytest.raises(ValueError, match=r"spec\.json is there already, with other content"):
        job.write_spec({"seed": 2})
    assert job.spec() == {"seed": 1}


def test_of_processes_that_claim_at_once_one_wins(job: JobFolder) -> None:
    assert all_at_once(3, LOOK, CLAIM, job.path) == ["lost", "lost", "won 1"]
    assert all_at_once(3, LOOK, CLAIM, job.path) == ["lost", "lost", "won 2"]  # a takeover is a race of the same kind


def test_who_was_taken_over_can_neither_renew_nor_publish(job: JobFolder, tmp_path: Path) -> None:
    first = job.renew(job.claim("first", None))
    second = job.claim("second", job.lease())
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    with pytest.raises(LeaseLost):
        job.renew(first)
    with pytest.raises(LeaseLost):
        job.accept(first, {"status": "ok", "by": "first"}, adapter)
    assert job.result() is None
    assert not job.adapter.exists()
    assert not (job.path / "result.json").exists()
    job.accept(second, {"status": "ok", "by": "second"}, adapter)
    assert job.result() == {"status": "ok", "by": "second"}
    assert job.adapter.is_dir()


def test_a_renewal_keeps_the_epoch_and_changes_the_etag(job: JobFolder) -> None:
    held = job.claim("one", None)
    renewed = job.renew(held)
    assert (renewed.lease.epoch, renewed.lease.beat) == (1, 1)
    assert renewed.etag != held.etag
    assert job.lease() == renewed
    with pytest.raises(LeaseLost):
        job.renew(held)


def test_a_result_counts_only_with_its_hash_in_the_lease(job: JobFolder) -> None:
    job.accept(job.claim("one", None), {"status": "ok", "loss": 0.5})
    text = (job.path / "result.json").read_text()
    (job.path / "result.json").write_text(text.replace("0.5", "0.1"))
    assert job.result() is None
    (job.path / "result.json").write_text(text)
    assert job.result() == {"status": "ok", "loss": 0.5}
    job.claim("two", job.lease())  # a takeover begins without a result
    assert job.result() is None


def test_killed_between_lease_and_result_there_is_no_result(job: JobFolder) -> None:
    held = killed_while_publishing(job)
    assert not (job.path / "result.json").exists()
    assert job.result() is None
    again = job.claim("again", held)
    assert again.lease.epoch == 2
    job.accept(again, {"status": "ok"})
    assert job.result() == {"status": "ok"}


def test_an_older_result_does_not_count_for_a_newer_lease(job: JobFolder) -> None:
    job.accept(job.claim("one", None), {"status": "failed"})
    killed_while_publishing(job)
    assert (job.path / "result.json").exists()
    assert job.result() is None


def test_checkpoints_walk_back_past_what_is_not_whole(job: JobFolder) -> None:
    steps = [checkpoint(job, 1, 10), checkpoint(job, 1, 20), checkpoint(job, 2, 100), checkpoint(job, 2, 120)]
    (steps[3] / "MANIFEST.json").unlink()  # unfinished
    weights = steps[2] / "weights"
    weights.write_bytes(weights.read_bytes()[:-1])  # truncated
    assert job.complete_checkpoints() == [steps[1], steps[0]]
    (steps[1] / "extra").touch()
    assert job.complete_checkpoints() == [steps[0]]


def test_the_most_steps_come_first_whatever_their_epoch(job: JobFolder) -> None:
    late, early = checkpoint(job, 1, 100), checkpoint(job, 2, 9)
    same = checkpoint(job, 2, 100)
    assert job.complete_checkpoints() == [same, late, early]


def test_pruning_keeps_the_newest_whole_ones(job: JobFolder) -> None:
    steps = [checkpoint(job, 1, step) for step in (10, 20, 30, 40)]
    shutil.rmtree(steps[3])
    steps[3].mkdir()
    (steps[3] / "weights").touch()
    job.prune_checkpoints(keep=2)
    assert sorted(job.checkpoints.iterdir()) == steps[1:3]


def test_progress_comes_in_the_order_of_epochs_and_batches(job: JobFolder) -> None:
    job.add_progress(2, 1, [{"step": 3}])
    job.add_progress(1, 2, [{"step": 2}])
    job.add_progress(1, 1, [{"step": 0}, {"step": 1}])
    assert [line["step"] for line in job.progress()] == [0, 1, 2, 3]
    assert [file.name for file in job.progress_files()] == [
        "0001-000001.jsonl",
        "0001-000002.jsonl",
        "0002-000001.jsonl",
    ]


def test_a_stop_is_asked_for_and_withdrawn(job: JobFolder) -> None:
    assert job.stop_reason() is None
    job.ask_to_stop("cancelled")
    assert job.stop_reason() == "cancelled"
    job.withdraw_stop()
    job.withdraw_stop()
    assert job.stop_reason() is None


def test_nothing_half_written_is_left_by_who_lost(job: JobFolder) -> None:
    held: Held = job.claim("one", None)
    job.claim("two", held)
    with pytest.raises(LeaseLost):
        job.accept(held, {"status": "ok"})
    assert sorted(each.name for each in job.path.iterdir()) == [".lock", "lease.json", "spec.json"]

"""Jobs in a bucket, on a real S3: one trainer at a time, one result that counts, and nothing half counts as whole."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from jobs.pod_env import pod_bucket, pod_env
from registry.bucket import open_bucket
from registry.errors import BucketError, JobError
from registry.job_bucket import JobBucket, LeaseWatch, Permit, attempt_of
from registry.job_folder import JobFolder, LeaseLost
from registry.manifest import broken_files, manifest_digest, write_manifest
from tests.conftest import all_at_once
from tests.fakes.broken_line import line_to
from tests.weed_server import OTHER, OWN, WeedServer

PREPARE = """
import json, sys
from pathlib import Path
from registry.bucket import open_bucket
from registry.job_bucket import JobBucket
from registry.job_folder import LeaseLost
from registry.settings import Settings
job = JobBucket(open_bucket(Settings(**json.loads(Path("settings.json").read_text()))), "job")
seen = job.lease()
"""
CLAIM = """
try:
    print("won", job.claim("a trainer", seen).lease.epoch)
except LeaseLost:
    print("lost")
"""


@pytest.fixture
def bucket(s3: WeedServer, request: pytest.FixtureRequest) -> JobBucket:
    return JobBucket(open_bucket(s3.settings(f"jobs/{request.node.name}")), "job", attempt=3)


@pytest.fixture
def job(tmp_path: Path) -> JobFolder:
    folder = JobFolder(tmp_path / "job")
    folder.write_spec({"seed": 1})
    for name, text in {"train.jsonl": "{}\n" * 100, "more/test.jsonl": "{}\n"}.items():
        (folder.data / name).parent.mkdir(parents=True, exist_ok=True)
        (folder.data / name).write_text(text)
    return folder


def other(tmp_path: Path) -> JobFolder:
    """The same job's folder on another machine."""
    return JobFolder(tmp_path / "elsewhere")


def checkpoint(job: JobFolder, epoch: int, step: int) -> Path:
    folder = job.checkpoints / f"{epoch:04d}-{step}"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(os.urandom(2000))
    write_manifest(folder, step=step)
    return folder


def adapter(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(os.urandom(5000))
    write_manifest(folder)
    return folder


def test_of_trainers_that_claim_at_once_one_wins(s3: WeedServer, tmp_path: Path) -> None:
    wanted = {"bucket", "s3_endpoint", "s3_access_key", "s3_secret_key"}
    (tmp_path / "settings.json").write_text(s3.settings(f"race/{tmp_path.name}").model_dump_json(include=wanted))
    assert all_at_once(3, PREPARE, CLAIM, tmp_path) == ["lost", "lost", "won 1"]
    assert all_at_once(3, PREPARE, CLAIM, tmp_path) == [
        "lost",
        "lost",
        "won 2",
    ]  # a takeover is a race of the same kind


def test_who_was_taken_over_can_neither_renew_nor_publish(bucket: JobBucket, tmp_path: Path) -> None:
    first = bucket.renew(bucket.claim("first", None))
    second = bucket.claim("second", bucket.lease())
    with pytest.raises(LeaseLost):
        bucket.renew(first)
    with pytest.raises(LeaseLost):
        bucket.accept(first, {"status": "ok", "by": "first"}, adapter(tmp_path / "first"))
    assert bucket.result() is None
    with pytest.raises(JobError, match="has no adapter yet"):
        bucket.fetch_adapter(tmp_path / "none")
    wanted = adapter(tmp_path / "second")
    bucket.accept(second, {"status": "ok", "by": "second"}, wanted)
    assert bucket.result() == {"status": "ok", "by": "second"}
    bucket.fetch_adapter(tmp_path / "fetched")
    assert manifest_digest(tmp_path / "fetched") == manifest_digest(wanted)


def test_a_job_that_is_done_is_taken_over_by_nobody(bucket: JobBucket) -> None:
    bucket.accept(bucket.claim("one", None), {"status": "ok"})
    with pytest.raises(LeaseLost):
        bucket.claim("two", bucket.lease())
    assert bucket.result() == {"status": "ok"}


def test_a_job_that_failed_may_be_tried_again(bucket: JobBucket) -> None:
    bucket.accept(bucket.claim("one", None), {"status": "failed"})
    assert bucket.claim("two", bucket.lease()).lease.epoch == 2
    assert bucket.result() is None


def test_a_write_whose_answer_was_lost_is_known_as_our_own(s3: WeedServer, tmp_path: Path) -> None:
    with line_to(s3.url) as line:
        bucket = JobBucket(open_bucket(s3.settings(f"lossy/{tmp_path.name}", s3_endpoint=line.url)), "job")
        direct = JobBucket(open_bucket(s3.settings(f"lossy/{tmp_path.name}")), "job")
        held = bucket.claim("one", None)
        for _ in range(2):
            line.lose_answer()
            with pytest.raises(BucketError, match="it does not answer"):
                bucket.renew(held)
            landed = direct.lease()
            assert landed is not None
            assert landed.lease.beat == held.lease.beat + 1, "the write that was to lose its answer was not done"
            held = bucket.renew(held)
            assert held == landed
        line.lose_answer()
        with pytest.raises(BucketError):
            bucket.renew(held)
        # The lease has a later beat than we know of, and is ours for all that.
        bucket.accept(held, {"status": "ok"})
    assert direct.result() == {"status": "ok"}


@pytest.mark.parametrize("writes", [0, 1, 2])
def test_a_trainer_that_dies_while_it_publishes_has_published_nothing(
    s3: WeedServer, tmp_path: Path, writes: int
) -> None:
    direct = JobBucket(open_bucket(s3.settings(f"dies/{tmp_path.name}")), "job")
    with line_to(s3.url) as line:
        dying = JobBucket(open_bucket(s3.settings(f"dies/{tmp_path.name}", s3_endpoint=line.url)), "job")
        held = dying.claim("one", None)
        line.cut_after(1 + writes)  # of the adapter's weights, its manifest, the result; then comes the lease
        with pytest.raises(BucketError, match="it does not answer"):
            dying.accept(held, {"status": "ok"}, adapter(tmp_path / "made"))
    assert direct.lease() == held
    assert direct.result() is None
    again = direct.claim("two", held)
    direct.accept(again, {"status": "ok"}, adapter(tmp_path / "again"))
    direct.fetch_adapter(tmp_path / "fetched")
    assert manifest_digest(tmp_path / "fetched") == manifest_digest(tmp_path / "again")


def test_a_job_that_is_forgotten_takes_no_other_along(bucket: JobBucket, job: JobFolder) -> None:
    bucket.push(job)
    other_job = JobBucket(bucket.bucket, "job2")
    other_job.push(job)
    bucket.forget()
    assert bucket.bucket.names("jobs/job/") == []
    assert other_job.bucket.names("jobs/job2/")
    assert bucket.bucket.names("data/")


def test_the_lease_names_the_pods_attempt(bucket: JobBucket) -> None:
    assert attempt_of(bucket.claim("host/1", None).lease) == 3


def test_a_lease_is_expired_when_its_etag_has_stood_still_for_the_term(bucket: JobBucket) -> None:
    now = [0.0]
    watch, held = LeaseWatch(10.0, lambda: now[0]), bucket.claim("one", None)

    def looks(until: int) -> list[bool]:
        found = []
        while now[0] < until:
            now[0] += 2.0
            found.append(watch.is_expired(held))
        return found

    assert not any(looks(8))
    held = bucket.renew(held)
    assert not any(looks(18))
    assert looks(22)[-1]
    held = bucket.renew(held)
    assert not any(looks(32))
    now[0] = 1000.0  # nobody could look: the bucket was away
    assert not watch.is_expired(held)


def test_a_pod_takes_nothing_over_from_a_later_one(bucket: JobBucket) -> None:
    earlier = JobBucket(bucket.bucket, "job", attempt=2)
    bucket.claim("three", earlier.claim("two", None))
    with pytest.raises(LeaseLost):
        earlier.claim("two, started again", earlier.lease())


def test_a_job_arrives_as_it_was_pushed(bucket: JobBucket, job: JobFolder, tmp_path: Path) -> None:
    job.add_attempt({"after": 1, "train": {"batch": 1}, "anew": False})
    bucket.push(job)
    bucket.push(job)
    there = other(tmp_path)
    bucket.fetch_job(there)
    assert there.spec() == {"seed": 1}
    assert there.attempts() == job.attempts()
    found = {each.relative_to(there.data).as_posix() for each in there.data.rglob("*") if each.is_file()}
    assert found == {"train.jsonl", "more/test.jsonl"}
    bucket.fetch_job(there)
    assert (there.data / "train.jsonl").read_text() == (job.data / "train.jsonl").read_text()


def test_data_that_is_there_already_is_not_sent_again(bucket: JobBucket, job: JobFolder) -> None:
    bucket.push(job)
    before = bucket.bucket.names("data/")
    again = JobBucket(bucket.bucket, "another")
    for name in (each.key for each in before if not each.key.endswith("MANIFEST.json")):
        bucket.bucket.put(name, b"sent once")  # would be put right by a second sending
    again.push(job)
    assert [each.size for each in bucket.bucket.names("data/") if each.size != 9] == [before[0].size]


def test_half_a_job_is_refused(bucket: JobBucket, job: JobFolder, tmp_path: Path) -> None:
    bucket.push(job)
    data = next(each.key for each in bucket.bucket.names("data/") if each.key.endswith("train.jsonl"))
    bucket.bucket.put(data, b"cut")
    with pytest.raises(JobError, match="is not whole in the bucket"):
        bucket.fetch_job(other(tmp_path))
    bucket.bucket.remove(f"{bucket.root}/data.json")
    with pytest.raises(JobError, match=r"is not \(or half\) in the bucket"):
        bucket.fetch_job(other(tmp_path))


def test_another_projects_job_of_the_same_name_is_not_overwritten(bucket: JobBucket, job: JobFolder) -> None:
    bucket.push(job)
    (job.path / "spec.json").write_text("{}")
    with pytest.raises(BucketError, match=r"spec\.json is there already, with other content"):
        bucket.push(job)


def test_a_base_model_travels_where_no_pod_can_fetch_it(bucket: JobBucket, job: JobFolder, tmp_path: Path) -> None:
    bucket.push(job, base=adapter(tmp_path / "base"))
    assert bucket.fetch_model(tmp_path / "fetched")
    assert manifest_digest(tmp_path / "fetched") == manifest_digest(tmp_path / "base")


def test_without_one_there_is_no_base_model(bucket: JobBucket, job: JobFolder, tmp_path: Path) -> None:
    bucket.push(job)
    assert not bucket.fetch_model(tmp_path / "fetched")


def test_resume_walks_back_to_the_last_whole_checkpoint(bucket: JobBucket, job: JobFolder, tmp_path: Path) -> None:
    bucket.push(job)
    steps = [checkpoint(job, 1, step) for step in (10, 20, 30, 40)]
    for each in steps:
        bucket.send_checkpoint(each, keep=4)
    bucket.bucket.remove(f"{bucket.root}/checkpoints/0001-40/MANIFEST.json")  # killed while it was sent
    bucket.bucket.put(f"{bucket.root}/checkpoints/0001-30/weights", b"damaged")
    there = other(tmp_path)
    bucket.fetch_job(there)
    assert [each.name for each in there.complete_checkpoints()] == ["0001-20"]
    assert not broken_files(there.checkpoints / "0001-20")
    bucket.fetch_job(there)
    assert sorted(each.name for each in there.checkpoints.iterdir()) == ["0001-20"]


def test_only_the_newest_checkpoints_are_kept(bucket: JobBucket, job: JobFolder) -> None:
    for step in (10, 20, 30):
        bucket.send_checkpoint(checkpoint(job, 1, step))
    kept = {each.key.split("/")[3] for each in bucket.bucket.names(f"{bucket.root}/checkpoints/")}
    assert kept == {"0001-20", "0001-30"}


def test_a_job_that_begins_anew_has_no_checkpoint(bucket: JobBucket, job: JobFolder, tmp_path: Path) -> None:
    bucket.send_checkpoint(checkpoint(job, 1, 10))
    job.add_attempt({"after": 1, "train": {}, "anew": True})
    bucket.push(job)
    there = other(tmp_path)
    bucket.fetch_job(there)
    assert there.complete_checkpoints() == []
    bucket.send_checkpoint(checkpoint(job, 2, 5))
    bucket.fetch_job(there)
    assert [each.name for each in there.complete_checkpoints()] == ["0002-5"]


def test_what_a_trainer_far_away_does_is_seen_in_the_local_folder(
    bucket: JobBucket, job: JobFolder, tmp_path: Path
) -> None:
    held = bucket.claim("far", None)
    for number in range(1, 30):
        bucket.send_part("progress", f"0001-{number:06d}.jsonl", json.dumps({"step": number}).encode() + b"\n")
    bucket.send_part("log", "000000000000001-000001.txt", b"one\ntw")
    bucket.pull(job)
    assert [line["step"] for line in job.progress()] == list(range(1, 30))
    assert job.log.read_text() == "one\ntw"
    assert job.result() is None
    bucket.send_part("progress", "0001-000030.jsonl", b'{"step": 30}\n')
    bucket.send_part("log", "000000000000001-000002.txt", b"o\nthree\n")
    bucket.accept(held, {"status": "ok", "loss": 0.5}, adapter(tmp_path / "made"))
    bucket.pull(job)
    bucket.pull(job)
    assert [line["step"] for line in job.progress()] == list(range(1, 31))
    assert job.log.read_text() == "one\ntwo\nthree\n"
    assert job.result() == {"status": "ok", "loss": 0.5}
    assert job.accepted() == 1


def test_a_log_whose_puller_was_killed_gets_no_part_twice(bucket: JobBucket, job: JobFolder) -> None:
    bucket.send_part("log", "000000000000001-000001.txt", b"one\n")
    bucket.pull(job)
    with job.log.open("a") as log:
        log.write("tw")  # of a part that was being appended
    bucket.send_part("log", "000000000000001-000002.txt", b"two\n")
    bucket.pull(job)
    assert job.log.read_text() == "one\ntwo\n"


def test_a_lease_taken_over_shows_no_earlier_result(bucket: JobBucket, job: JobFolder) -> None:
    bucket.accept(bucket.claim("one", None), {"status": "failed"})
    bucket.pull(job)
    assert job.result() == {"status": "failed"}
    bucket.claim("two", bucket.lease())
    bucket.pull(job)
    assert job.result() is None


def test_permit_and_stop_are_seen_on_the_other_side(bucket: JobBucket, job: JobFolder) -> None:
    assert bucket.permit() is None
    bucket.write_permit(Permit(attempt=2, until=10.0, deadline=20.0, reason="half a dollar"))
    found = bucket.permit()
    assert found is not None
    assert found[0] == Permit(2, 10.0, 20.0, "half a dollar")
    assert found[1] > 1_000_000_000
    job.ask_to_stop("cancelled")
    bucket.push(job)
    assert bucket.stop_reason() == "cancelled"
    job.withdraw_stop()
    bucket.push(job)
    assert bucket.stop_reason() is None
    assert bucket.end_note(3) is None
    bucket.note_end("the permit is over")
    assert bucket.end_note(3) == "the permit is over"


def test_a_pod_that_was_here_has_signed(bucket: JobBucket) -> None:
    for pod in ("abc", "a-b", "abc"):
        JobBucket(bucket.bucket, "job", attempt=3, pod=pod).sign()
    assert bucket.signed() == [(3, "a-b"), (3, "abc")]


def test_a_pod_gets_a_key_of_its_own_and_nothing_of_ours(s3: WeedServer) -> None:
    settings = s3.settings("desk", runpod_api_key="rpa_account", receiver_token="token")
    env = pod_env(settings, "support-1", 2)
    assert env["FT_JOB"] == "support-1"
    assert env["FT_S3_ACCESS_KEY"] == settings.pod_s3_access_key
    assert not {*OWN, "rpa_account", "token"} & {*env.values()}


def test_our_own_key_is_refused_for_pods(s3: WeedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BucketError, match="pods have no key for the bucket"):
        pod_env(s3.settings("desk", pod_s3_access_key=""), "job", 1)
    with pytest.raises(BucketError, match="the key for pods is our own key"):
        pod_env(s3.settings("desk", pod_s3_access_key=OWN[0], pod_s3_secret_key=OWN[1]), "job", 1)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "from-the-shell")
    with pytest.raises(BucketError, match="the key for pods is our own key"):
        pod_env(s3.settings("desk", s3_access_key="", pod_s3_access_key="from-the-shell"), "job", 1)


def test_a_pods_key_does_a_job_and_reaches_no_other_bucket(s3: WeedServer, job: JobFolder, tmp_path: Path) -> None:
    settings = s3.settings(f"limited/{tmp_path.name}")
    JobBucket(open_bucket(settings), "job").push(job)
    pod_bucket(settings).check()
    pod = JobBucket(pod_bucket(settings), "job", attempt=1)
    pod.fetch_job(other(tmp_path))
    pod.send_checkpoint(checkpoint(job, 1, 1), keep=0)
    pod.accept(pod.claim("pod", None), {"status": "ok"}, adapter(tmp_path / "made"))
    elsewhere = settings.model_copy(update={"bucket": f"s3://{OTHER}/limited"})
    open_bucket(elsewhere).put("secret", b"ours")
    with pytest.raises(BucketError, match="the key may not do that"):
        pod_bucket(elsewhere).get("secret")
    with pytest.raises(BucketError, match="the key may not do that"):
        pod_bucket(elsewhere).put("secret", b"theirs")
    with pytest.raises(BucketError, match="the key may not do that"):
        pod_bucket(elsewhere).names("")

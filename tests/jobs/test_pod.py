"""A pod's own start command, as a local process on a stand-in for RunPod, with its job in a real S3."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from jobs.claim import Claim
from jobs.pod_env import IN_BUCKET, pod_env
from jobs.pod_mirror import Mirror
from jobs.pod_watchdog import Limits, Seen, Usage, Watchdog, why_end
from registry.bucket import open_bucket
from registry.errors import BucketError
from registry.job_bucket import JobBucket, Permit
from registry.job_folder import Held, JobFolder, Lease
from registry.runpod_api import RunPod
from registry.runpod_shapes import PodOrder
from registry.settings import Settings
from tests.fakes.broken_line import Line, line_to
from tests.fakes.bucket_job import BucketJob, bucket_job
from tests.fakes.runpod.started import Standin, standin
from tests.weed_server import WeedServer

GPU = "NVIDIA A40"
QUICK = {"FT_POD_LOOK_SECONDS": "0.3", "FT_POD_GRACE_SECONDS": "3", "FT_POD_END_SECONDS": "8"}
# Takes the job, and then neither trains nor obeys.
DEAF = """
import signal, sys, time
from pathlib import Path
from jobs.claim import Claim
from registry.job_folder import JobFolder
signal.signal(signal.SIGTERM, signal.SIG_IGN)
with Claim(JobFolder(Path(sys.argv[-1]))).kept():
    print("deaf", flush=True)
    time.sleep(600)
"""


@dataclass
class Field:
    """A cloud, a job in the bucket, and what a pod for it is told."""

    cloud: Standin
    made: BucketJob
    settings: Settings

    @property
    def remote(self) -> JobBucket:
        return self.made.remote

    def permit(self, attempt: int = 1, seconds: float = 300, **more: float) -> None:
        now = self.remote.bucket.now()
        self.remote.write_permit(Permit(attempt, now + seconds, now + more.get("deadline", 600)))

    def rent(self, attempt: int = 1, **env: str) -> str:
        """The id of a new pod."""
        told = {**pod_env(self.settings, self.made.job.name, attempt), **QUICK, "FT_TRAINER": self.made.trainer, **env}
        order = PodOrder(
            name=f"ft-a{attempt}", image="ft", gpu=GPU, cloud="secure", env=told, args="python -m jobs.pod",
            disk_gb=10, data_centers=(), network_volume=None,
        )  # fmt: skip
        with RunPod(self.cloud.url, self.cloud.key) as api:
            return api.create(order).id

    def until_gone(self, pod: str, seconds: float = 60) -> str:
        """What it printed."""
        self.cloud.until(lambda truth: not _alive(truth, pod), seconds)
        return (self.cloud.folder / "pods" / f"{pod}.log").read_text()

    def until(self, met: Callable[[], object], seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not met():
            assert time.monotonic() < end, [each.read_text() for each in (self.cloud.folder / "pods").glob("*.log")]
            time.sleep(0.1)

    def step(self) -> int:
        return max(self.made.steps(), default=0)

    def log(self) -> str:
        self.remote.pull(self.made.job)
        return self.made.job.log.read_text() if self.made.job.log.exists() else ""


@pytest.fixture
def field(s3: WeedServer, tmp_path: Path) -> Iterator[Field]:
    with standin(tmp_path / "cloud", provision=0.05, start=0.05, grace=2) as cloud:
        settings = s3.settings(f"pods/{tmp_path.name}", runpod_url=cloud.url, runpod_api_key=cloud.key)
        yield Field(cloud, bucket_job(tmp_path / "here", settings), settings)


def slow(field: Field, tmp_path: Path) -> Field:
    """With a job of minutes."""
    return replace(field, made=bucket_job(tmp_path / "slow", field.settings, "m-slow", max_steps=4000))


def _alive(truth: dict[str, Any], pod: str) -> bool:
    return any(each["id"] == pod and each["alive"] for each in truth["pods"])


def test_a_pod_does_its_job_and_ends_itself(field: Field, tmp_path: Path) -> None:
    field.permit()
    said = field.until_gone(field.rent())
    assert "pod: the end: the job is done" in said
    result = field.remote.result()
    assert result is not None, said
    assert result["status"] == "ok"
    assert field.step() == 20
    assert field.made.job.result() == result
    assert "pod: starting the trainer" in field.log()
    field.remote.fetch_adapter(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert field.remote.end_note(1) == "the job is done"
    checkpoints = field.remote.bucket.names(f"{field.remote.root}/checkpoints/")
    kept = {each.key.split("/")[3] for each in checkpoints}
    assert "0001-20" in kept
    assert len(kept) <= 2


def test_without_a_permit_a_pod_ends_at_once(field: Field) -> None:
    assert "the end: there is no permit" in field.until_gone(field.rent(), 20)
    assert field.remote.lease() is None


def test_a_pod_whose_job_was_given_to_another_ends_at_once(field: Field) -> None:
    field.permit(attempt=2)
    assert "the end: the job has been given to pod number 2" in field.until_gone(field.rent(), 20)
    assert field.remote.lease() is None


def test_a_pod_whose_job_is_done_ends_at_once(field: Field) -> None:
    field.permit()
    done = JobBucket(field.remote.bucket, field.made.job.name, attempt=1)
    done.accept(done.claim("earlier", None), {"status": "ok"})
    assert "the end: the job has its result: ok" in field.until_gone(field.rent(), 20)


def test_when_the_permit_ends_the_checkpoint_is_sent_and_the_pod_gone_in_a_minute(field: Field, tmp_path: Path) -> None:
    field = slow(field, tmp_path)
    field.permit()
    pod = field.rent()
    field.until(lambda: field.step() > 10)
    field.permit(seconds=1)
    asked = time.monotonic()
    said = field.until_gone(pod, 60)
    assert time.monotonic() - asked < 20  # with the test's own times; 60 s with a pod's
    assert "the end: the permit is over" in said
    result = field.remote.result()
    assert result is not None, said
    assert (result["status"], result["message"]) == ("stopped", "stopped by SIGTERM")
    field.permit(attempt=2)
    second = field.rent(attempt=2)
    field.until(lambda: (held := field.remote.lease()) and held.lease.epoch == 2)
    field.until(lambda: len(list((field.cloud.folder / "pods" / second).glob("jobs/*/checkpoints/0001-*"))) == 1)
    before = len(field.made.steps())
    field.until(lambda: len(field.made.steps()) > before)
    assert field.made.steps()[before] > 10, "it began anew"
    field.permit(attempt=3)
    assert "given to pod number 3" in field.until_gone(second)


def test_a_trainer_that_does_not_obey_is_killed_and_the_pod_ends(field: Field, tmp_path: Path) -> None:
    field.permit()
    (tmp_path / "deaf.py").write_text(DEAF)
    pod = field.rent(FT_TRAINER=f"python {tmp_path / 'deaf.py'}")
    field.until(lambda: "deaf" in field.log())
    field.permit(seconds=0)
    asked = time.monotonic()
    assert "the end: the permit is over" in field.until_gone(pod, 30)
    assert time.monotonic() - asked < 20
    assert field.remote.result() is None


def test_a_pod_that_is_asked_to_stop_stops_with_a_checkpoint(field: Field, tmp_path: Path) -> None:
    field = slow(field, tmp_path)
    field.permit()
    pod = field.rent()
    field.until(lambda: field.step() > 5)
    field.remote.ask_to_stop("cancelled by somebody")
    assert "the end: the trainer was stopped" in field.until_gone(pod)
    result = field.remote.result()
    assert result is not None
    assert (result["status"], result["message"]) == ("stopped", "cancelled by somebody")


def test_a_container_that_is_killed_and_started_again_goes_on_with_its_job(field: Field, tmp_path: Path) -> None:
    field.cloud.faults({"fault": "restarts"})
    field = slow(field, tmp_path)
    field.permit()
    pod = field.rent()
    field.until(lambda: field.step() > 15)
    field.cloud.fate(pod, "die")
    field.until(lambda: (held := field.remote.lease()) and held.lease.epoch == 2)
    before = len(field.made.steps())
    field.until(lambda: len(field.made.steps()) > before)
    assert field.made.steps()[-1] > 10, "it began anew"
    field.permit(seconds=0)
    field.until_gone(pod)


def test_of_two_pods_of_one_attempt_one_waits_for_the_other(field: Field) -> None:
    field.permit()
    pods = [field.rent(), field.rent()]
    said = [field.until_gone(each) for each in pods]
    held, result = field.remote.lease(), field.remote.result()
    assert result is not None, said
    assert result["status"] == "ok"
    assert held is not None
    assert sum("the end: the job is done" in each for each in said) == 1, said


def test_a_bucket_that_is_away_for_a_while_stops_no_trainer(s3: WeedServer, tmp_path: Path) -> None:
    with standin(tmp_path / "cloud", provision=0.05, start=0.05, grace=2) as cloud, line_to(s3.url) as line:
        ours = s3.settings(f"away/{tmp_path.name}", runpod_url=cloud.url, runpod_api_key=cloud.key)
        field = Field(cloud, bucket_job(tmp_path / "here", ours, max_steps=200),
                      ours.model_copy(update={"s3_endpoint": line.url}))  # fmt: skip
        field.permit()
        pod = field.rent()
        field.until(lambda: field.step() > 10)
        _away_for(line, 4.0)
        said = field.until_gone(pod)
        assert "it does not answer" in said
        result = field.remote.result()
        assert result is not None, said
        assert result["status"] == "ok"
        held = field.remote.lease()
        assert held is not None
        assert held.lease.epoch == 1
        assert field.made.steps() == list(range(201)), "progress is missing, or told twice"


def _away_for(line: Line, seconds: float) -> None:
    line.cut()
    time.sleep(seconds)
    line.mend()


@pytest.mark.parametrize("how", ["cut", "hang"])
def test_the_permits_end_comes_also_while_the_bucket_is_away(s3: WeedServer, tmp_path: Path, how: str) -> None:
    with standin(tmp_path / "cloud", provision=0.05, start=0.05, grace=2) as cloud, line_to(s3.url) as line:
        ours = s3.settings(f"away/{tmp_path.name}", runpod_url=cloud.url, runpod_api_key=cloud.key)
        field = Field(cloud, bucket_job(tmp_path / "here", ours, max_steps=4000),
                      ours.model_copy(update={"s3_endpoint": line.url}))  # fmt: skip
        field.permit()
        pod = field.rent()
        field.until(lambda: field.step() > 5)
        field.permit(seconds=4)
        time.sleep(1.5)
        line.cut() if how == "cut" else line.hang()
        cut = time.monotonic()
        assert "the end: the permit is over" in field.until_gone(pod, 40)
        assert time.monotonic() - cut < 4 + 8 + 6


def test_a_base_model_of_other_content_is_refused_and_the_run_told(field: Field) -> None:
    for each in field.remote.bucket.names("models/"):
        field.remote.bucket.remove(each.key)
    field.permit()
    said = field.until_gone(field.rent(HF_HUB_OFFLINE="1"), 90)
    assert "the job cannot be begun" in said
    result = field.remote.result()
    assert result is not None
    assert (result["status"], result["class"]) == ("failed", "bad_input")


def test_a_terminate_that_is_refused_or_without_effect_is_repeated(field: Field) -> None:
    field.cloud.faults(
        {"fault": "error", "match": "* /v2/pods/*", "times": 4},
        {"fault": "ignore", "match": "POST /v2/pods/*", "times": 1},
    )
    said = field.until_gone(field.rent(), 60)
    assert "the end: there is no permit" in said
    assert len([each for each in field.cloud.truth()["requests"] if each["method"] == "POST"]) >= 4


def test_a_trainer_stops_when_half_the_term_has_gone_without_a_renewal(
    s3: WeedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with line_to(s3.url) as line:
        settings = s3.settings(f"half/{tmp_path.name}", s3_endpoint=line.url)
        for name, value in {**pod_env(settings, "job", 1), **IN_BUCKET, "FT_LEASE_SECONDS": "6"}.items():
            monkeypatch.setenv(name, value)
        claim = Claim(JobFolder(tmp_path))
        with claim.kept():
            time.sleep(2)
            line.cut()
            cut = time.monotonic()
            while claim.stop_reason() is None:
                assert time.monotonic() - cut < 30
                time.sleep(0.05)
            assert time.monotonic() - cut > 1.5
            assert claim.stop_reason() == "the bucket was away for too long"


# What the watchdog decides, from what it sees.

LIMITS = Limits(start=100, idle=50, quiet=20)
PERMIT = Permit(1, 1000.0, 2000.0, "0.5 dollars")
MINE = Held(Lease(1, "a1/pod/host/7/x", 7), '"1"')
FINE = Seen(attempt=1, up=200.0, permit=PERMIT, now=900.0, held=MINE, pod="pod")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, ""),
        ({"permit": None}, "there is no permit"),
        ({"permit": replace(PERMIT, attempt=2)}, "the job has been given to pod number 2"),
        ({"now": 1000.0}, "the permit is over: 0.5 dollars"),
        ({"permit": replace(PERMIT, until=9e9), "now": 2000.0}, "the deadline has passed"),
        ({"held": None, "up": 99.0}, ""),
        ({"held": None}, "no trainer has claimed the job in 100 s"),
        ({"pod": "twin"}, "no trainer has claimed the job in 100 s"),
        ({"quiet": True}, "the trainer has not renewed its lease for 20 s"),
        ({"idle": 51.0}, "the card has been idle for 50 s"),
        ({"now": None, "permit": None, "up": 99.0}, ""),
        ({"now": None, "permit": None}, "the bucket was never reached"),
    ],
)
def test_the_watchdog_ends_a_pod_that_should_not_go_on(change: dict[str, Any], why: str) -> None:
    assert why_end(replace(FINE, **change), LIMITS) == why


def test_between_looks_the_permit_runs_out_on_our_own_clock(s3: WeedServer, tmp_path: Path) -> None:
    with line_to(s3.url) as line:
        bucket = open_bucket(s3.settings(f"clock/{tmp_path.name}", s3_endpoint=line.url))
        remote = JobBucket(bucket, "job", attempt=1, pod="pod")
        clock = [5000.0]
        watchdog = Watchdog(remote, LIMITS, lambda: None, lambda: clock[0])
        remote.write_permit(Permit(1, remote.bucket.now() + 30, 9e9))
        watchdog.look()
        assert watchdog.why() == ""
        line.cut()
        with pytest.raises(BucketError):
            remote.permit()
        clock[0] += 25
        watchdog.look()
        assert watchdog.why() == ""
        clock[0] += 6
        assert watchdog.why() == "the permit is over"


def test_a_process_that_waits_is_idle_and_one_that_computes_is_not() -> None:
    clock = [0.0]
    usage = Usage(os.getpid, lambda: clock[0])
    usage.gpus = []
    clock[0] = 11.0
    usage.idle()
    end = time.process_time() + 0.5
    while time.process_time() < end:
        pass
    clock[0] = 22.0
    assert usage.idle() == 0.0
    clock[0] = 1000.0
    assert usage.idle() == 978.0


def test_a_pods_trainer_does_not_get_the_key_that_ends_pods(field: Field) -> None:
    field.permit()
    field.until_gone(field.rent(FT_TRAINER="python -c 'import os; print(*sorted(os.environ))'"))
    assert "FT_CLAIMS" in field.log()
    assert "RUNPOD_API_KEY" not in field.log()


def test_a_volume_that_cannot_be_written_is_done_without(field: Field, tmp_path: Path) -> None:
    (tmp_path / "volume").touch()
    field.permit()
    said = field.until_gone(field.rent(FT_CACHE=str(tmp_path / "volume" / "cache")))
    assert "cannot be written; base models go to" in said
    assert "the end: the job is done" in said


def test_a_mirror_that_was_killed_while_it_sent_sends_the_same_part_again(field: Field, tmp_path: Path) -> None:
    """More lies there by now, and it comes under a name of its own: what was fetched already is not looked at again."""
    job, note = JobFolder(tmp_path / "there"), tmp_path / "mirror.json"
    job.path.mkdir()
    first = Mirror(job, field.remote, 1.0, note=note)
    job.add_progress(1, 1, [{"step": 1}])
    job.log.write_bytes(b"one\n")
    first.bundle, first.log_to = job.progress_files(), 4
    first._keep()
    job.add_progress(1, 2, [{"step": 2}])
    job.log.write_bytes(b"one\ntwo\n")
    Mirror(job, field.remote, 2.0, note=note).round()
    names = [each.key for each in field.remote.bucket.names(f"{field.remote.root}/progress/")]
    assert [name.rpartition("/")[2] for name in names] == ["0001-000001.jsonl", "0001-000002.jsonl"]
    assert field.made.steps() == [1, 2]
    assert field.log() == "one\ntwo\n"

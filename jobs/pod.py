"""`python -m jobs.pod`: what a pod runs. Does one job of the bucket, watched by its own watchdog, and ends the pod.

    FT_JOB, FT_ATTEMPT                       the job, and the number that its permit must name
    FT_BUCKET, FT_S3_*                       where it lies, with the pods' own key
    FT_RUNPOD_URL, RUNPOD_POD_ID, RUNPOD_API_KEY   how the pod ends itself
    FT_TRAINER                               another command for the trainer, which gets the job's folder; what
                                             evaluates is always jobs.evaluator
    FT_POD_START_SECONDS, FT_POD_IDLE_SECONDS, FT_LEASE_SECONDS

Killed and started again it goes on with its own job from the last checkpoint in the bucket; a job that is done, or a
permit that is over or another pod's, ends the pod at once.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from jobs.evaluation_job import KIND
from jobs.job_base import base_here
from jobs.pod_env import IN_BUCKET, job_of_pod
from jobs.pod_mirror import Mirror
from jobs.pod_watchdog import Limits, Watchdog
from registry.errors import BucketError, CloudError, FtError
from registry.job_bucket import JobBucket, LeaseWatch, attempt_of, pod_of
from registry.job_folder import JobFolder, Lease, LeaseLost
from registry.project import cache_folder
from registry.runpod_calls import Calls

# A trainer renews every five seconds; another pod of the same attempt that is silent for so long is taken for dead.
TWIN_SECONDS = 60.0
TICK = 0.25
SHORT_WAIT, LONG_WAIT = 1.0, 60.0

T = TypeVar("T")


def main() -> None:
    remote = job_of_pod()
    _use_writable_cache()
    reason = PodJob(remote, JobFolder(Path.cwd() / "jobs" / remote.job_id), _limits()).do()
    print(f"pod: the end: {reason}", flush=True)
    end_pod(*(os.environ.get(name, "") for name in ("FT_RUNPOD_URL", "RUNPOD_POD_ID", "RUNPOD_API_KEY")))
    # Not sys.exit: an upload that hangs would be waited for.
    os._exit(0)


class PodJob:
    """One start of a pod's container."""

    def __init__(self, remote: JobBucket, job: JobFolder, limits: Limits) -> None:
        self.remote, self.job, self.limits = remote, job, limits
        self.trainer: subprocess.Popen[bytes] | None = None
        self.ended: list[str] = []
        self.wake, self.stopping, self.starting = threading.Event(), threading.Event(), threading.Lock()
        self.watchdog = Watchdog(remote, limits, self._trainer_pid)
        self.mirror: Mirror | None = None

    def do(self) -> str:
        """Work until the job is done or the watchdog says stop; why it ended. All that it started has ended then."""
        signal.signal(signal.SIGTERM, lambda *_: self._over("the pod was told to stop"))
        work = threading.Thread(target=self._work, name="work", daemon=True)
        threading.Thread(target=self.watchdog.watch, name="watch", daemon=True).start()
        while True:
            # Nothing begins without a permit: who has none must not take the job from whom it was given to.
            looked = self.watchdog.seen is not None
            if reason := self.watchdog.why() or next(iter(self.ended), ""):
                break
            if looked and not work.ident:
                work.start()
            self.wake.wait(TICK)
        self._stop(reason)
        return reason

    def _work(self) -> None:
        """Set up, then train: in a thread of its own, because neither may keep the watchdog from looking."""
        try:
            self._patiently(self.remote.sign)
            why = self._why_not() or self._set_up() or self._train()
        except LeaseLost:
            why = "another pod has the job"
        except Exception as error:
            traceback.print_exc()
            why = f"{type(error).__name__}: {error}"
        self._over(why)

    def _over(self, why: str) -> None:
        self.ended.append(why)
        self.wake.set()

    def _why_not(self) -> str:
        """'' if there is something to do."""
        held = self._patiently(self.remote.lease)
        result = self._patiently(self.remote.result)
        if held and result and (result["status"] == "ok" or self._is_mine(held.lease)):
            return f"the job has its result: {result['status']}"
        return ""

    def _set_up(self) -> str:
        self.job.path.mkdir(parents=True, exist_ok=True)
        self.mirror = Mirror(self.job, self.remote, self._patiently(self.remote.bucket.now), self.limits.look)
        threading.Thread(target=self.mirror.run, name="mirror", daemon=True).start()
        try:
            self._say("fetching the job")
            self._patiently(lambda: self.remote.fetch_job(self.job))
            self._say("getting the base model")
            self._patiently(lambda: base_here(self.remote, self.job))
        except FtError as error:
            self._say(str(error))
            return self._publish_failure(error)
        return self._wait_for_twin()

    def _train(self) -> str:
        self._say("starting the trainer")
        command = _program(self.job)
        with self.job.log.open("ab") as log, self.starting:
            if self.stopping.is_set():
                return "stopped before the trainer"
            self.trainer = subprocess.Popen(
                [*command, str(self.job.path)], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True, env=_trainer_env(),
            )  # fmt: skip
        code = self.trainer.wait()
        return {0: "the job is done", 3: "the trainer was stopped", 4: "another pod has the job"}.get(
            code, f"the trainer ended with exit code {code}"
        )

    def _stop(self, reason: str) -> None:
        """Checkpoint, stop, send: within `limits.end` seconds, whatever hangs."""
        self._say(reason)
        with self.starting:
            self.stopping.set()
        end = time.monotonic() + self.limits.end
        if self.trainer and self.trainer.poll() is None:
            self._signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.trainer.wait(self.limits.grace)
            self._signal(signal.SIGKILL)
        sending = threading.Thread(target=self._send_last, args=[reason], name="last", daemon=True)
        sending.start()
        sending.join(max(0.0, end - time.monotonic()))

    def _send_last(self, reason: str) -> None:
        with suppress(BucketError):  # one that ends before it has begun costs as well
            self.remote.sign()
        if self.mirror:
            self.mirror.over.set()
            self.mirror.finished.wait()
        with suppress(BucketError):
            self.remote.note_end(reason)

    def _publish_failure(self, error: FtError) -> str:
        """What no other pod could do better either: the run ends with it, and no other pod is rented."""
        held = self._patiently(lambda: self.remote.claim("pod", self.remote.lease()))
        result = {"status": "failed", "class": "bad_input", "message": str(error), "steps": 0, "seconds": 0.0}
        self._patiently(lambda: self.remote.accept(held, result))
        return f"the job cannot be begun: {error.what}"

    def _wait_for_twin(self) -> str:
        """A create whose answer was lost may have made two pods for one attempt: the one that trains goes on."""
        watch = LeaseWatch(TWIN_SECONDS)
        while True:
            held = self._patiently(self.remote.lease)
            if held is None or self._is_mine(held.lease) or attempt_of(held.lease) != self.remote.attempt:
                return ""
            if held.lease.result:
                return "another pod of this attempt has done the job"
            if watch.is_expired(held):
                return ""
            time.sleep(self.limits.look)

    def _patiently(self, ask: Callable[[], T]) -> T:
        """Again and again while the bucket is away; the watchdog ends it."""
        while True:
            try:
                return ask()
            except BucketError as error:
                self._say(str(error))
                time.sleep(self.limits.look)

    def _is_mine(self, lease: Lease) -> bool:
        return (attempt_of(lease), pod_of(lease)) == (self.remote.attempt, self.remote.pod)

    def _say(self, text: str) -> None:
        """To the container's log, and to the job's, which our side follows."""
        print(f"pod: {text}", flush=True)
        with suppress(OSError), self.job.log.open("a", encoding="utf-8") as log:
            log.write(f"pod: {text}\n")

    def _trainer_pid(self) -> int | None:
        return self.trainer.pid if self.trainer and self.trainer.poll() is None else None

    def _signal(self, number: signal.Signals) -> None:
        """To the trainer and to all that it has started."""
        if self.trainer:
            with suppress(ProcessLookupError):
                os.killpg(self.trainer.pid, number)


def end_pod(url: str, pod: str, key: str) -> None:
    """Have RunPod terminate this pod, again and again: a yes is no proof. Comes back if RunPod does not know it."""
    if not (url and pod and key):
        print("pod: no RUNPOD_POD_ID, RUNPOD_API_KEY or FT_RUNPOD_URL: nothing is terminated", flush=True)
        return
    calls, path, wait = Calls(url, key, patience_s=0, timeout_s=20), f"/v2/pods/{quote(pod, safe='')}", SHORT_WAIT
    while not _terminated(calls, path):
        time.sleep(wait)
        wait = min(2 * wait, LONG_WAIT)


def _terminated(calls: Calls, path: str) -> bool:
    # Two ways: it is written nowhere what a pod's own key may do in RunPod's second API.
    for method, place, body in (("POST", f"{path}/action", {"action": "terminate"}), ("DELETE", path, None)):
        try:
            calls.ask(method, place, body=body, may_be_gone=True)
            return calls.ask("GET", path, may_be_gone=True) is None
        except CloudError as error:
            print(f"pod: {error}", flush=True)
    return False


def _program(job: JobFolder) -> list[str]:
    """What does the job: the evaluator, or a trainer."""
    if job.spec().get("kind") == KIND:
        return [sys.executable, "-m", "jobs.evaluator"]
    return shlex.split(os.environ.get("FT_TRAINER", "")) or [sys.executable, "-m", "jobs.trainer"]


def _trainer_env() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "RUNPOD_API_KEY"}
    return {"OMP_WAIT_POLICY": "PASSIVE", **kept, **IN_BUCKET, "PYTHONUNBUFFERED": "1"}


def _use_writable_cache() -> None:
    """A network volume may belong to root, which we are not: then the base model is fetched to the pod's own disk."""
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        if os.access(cache_folder(), os.W_OK):
            return
    except OSError as error:
        print(f"pod: {error}", flush=True)
    print(f"pod: {cache_folder()} cannot be written; base models go to {Path.cwd() / 'cache'}", flush=True)
    os.environ["FT_CACHE"] = str(Path.cwd() / "cache")


def _limits() -> Limits:
    """As `FT_POD_START_SECONDS` and so on say."""
    said = {each.name: os.environ.get(f"FT_POD_{each.name.upper()}_SECONDS") for each in fields(Limits)}
    return Limits(**{name: float(value) for name, value in said.items() if value})


if __name__ == "__main__":
    main()

"""Target: a card of this host, for a run that is led from a host with which it shares no folder.

The job's folder lies in the bucket, and the trainer claims the job there: of two hosts' trainers one is accepted. The
folder here is where it trains; what it writes is sent on by a thread of the worker, which goes on where an earlier
one was killed (`mirror.json`).
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from jobs.job_base import base_here
from jobs.pod_env import card_env
from jobs.pod_mirror import Mirror
from jobs.targets.local_card import STOP_SECONDS, LocalCard
from jobs.targets.target import Poll
from registry.bucket import Bucket
from registry.cards import Card, holder
from registry.errors import BucketError
from registry.file_locks import alone
from registry.job_bucket import JobBucket
from registry.job_folder import JobFolder
from registry.project import Project
from registry.settings import Settings

MIRROR_SECONDS = 2.0
# The last checkpoint of a job that ends: who watches waits so long for it, and it is sent on after that.
LAST_SECONDS = 300.0
NOTE = "mirror.json"
# Of this process, by job: a step that is repeated finds the thread that the one before it has started.
_mirrors: dict[Path, Mirror] = {}
_starting = threading.Lock()


class BucketCard:
    """As LocalCard, with the job fetched before its trainer starts and all that it writes sent on."""

    def __init__(
        self, project: Project, card: Card, bucket: Bucket, settings: Settings, stop_seconds: float = STOP_SECONDS
    ) -> None:  # fmt: skip
        self.project, self.card, self.bucket, self.settings = project, card, bucket, settings
        self.stop_seconds = stop_seconds

    def launch(self, folder: Path) -> bool:
        """Raises BucketError, and BaseModelError where the job's base model cannot be had here."""
        job = JobFolder(folder)
        if holder(self.project, self.card):  # asked again and again: nothing is fetched before it is free
            return False
        with only_one(job):
            self._settle(job)
            remote = self._remote(job)
            remote.send_attempts(job)
            remote.pull_lease(job)
            if _is_done(job):
                return False
            remote.fetch_job(job)
            base_here(remote, job)
            self._begin_mirror(job)  # before the trainer: a worker that is killed after this leaves a note
            return self._local(job).launch(folder)

    def poll(self, folder: Path) -> Poll:
        job = JobFolder(folder)
        if self._runs(job):
            self._send_on(job)
            return Poll("running")
        try:
            self._settle(job)
            self._remote(job).pull_lease(job)
        except BucketError as error:
            if not (folder / "spec.json").exists():
                raise
            return Poll("running", note=error.what)  # what was trained is not given up for a bucket that is away
        return self._local(job).poll(folder)

    def waits_for(self, folder: Path) -> str:
        return self._local(JobFolder(folder)).waits_for(folder)

    def fetch(self, folder: Path, target: Path) -> None:
        self._remote(JobFolder(folder)).fetch_adapter(target)

    def cancel(self, folder: Path, reason: str) -> None:
        """The trainer reads its stop here, so it stops while the bucket is away as well."""
        job = JobFolder(folder)
        job.path.mkdir(parents=True, exist_ok=True)
        self._local(job).cancel(folder, reason)
        with suppress(BucketError):
            self._settle(job)
            self._remote(job).pull_lease(job)

    def _runs(self, job: JobFolder) -> bool:
        return self._local(job).poll(job.path).state == "running"

    def _send_on(self, job: JobFolder) -> None:
        """See to it that a thread sends what the trainer writes; a bucket that is away must not end the watch."""
        with _starting, suppress(BucketError):
            if job.path not in _mirrors:
                mirror = _mirrors[job.path] = self._mirror(job)
                threading.Thread(target=mirror.run, name=f"mirror {job.name}", daemon=True).start()

    def _settle(self, job: JobFolder) -> None:
        """Send the rest of a trainer that is gone. Raises BucketError while that cannot be done."""
        mirror = _mirrors.get(job.path)
        if mirror:
            mirror.over.set()
            if not mirror.finished.wait(LAST_SECONDS):
                raise BucketError("what the trainer wrote is still being sent", place=self.bucket.place)
            _mirrors.pop(job.path, None)
        elif (job.path / NOTE).exists():
            mirror = self._mirror(job)
            mirror.round()
        if mirror and mirror.said:
            raise BucketError(mirror.said, place=self.bucket.place)
        (job.path / NOTE).unlink(missing_ok=True)

    def _begin_mirror(self, job: JobFolder) -> None:
        """All that is here now is in the bucket: the note begins behind it."""
        (job.path / NOTE).unlink(missing_ok=True)
        self._mirror(job)

    def _mirror(self, job: JobFolder) -> Mirror:
        bucket, start = self.bucket, f"{self._remote(job).root}/log/"
        logs = bucket.names(start)
        # A pod's log may be there: what comes now must sort behind it.
        attempt = int(logs[-1].key.removeprefix(start)[:4]) if logs else 0
        numbered = JobBucket(bucket, job.name, attempt)
        return Mirror(job, numbered, bucket.now(), MIRROR_SECONDS, job.path / NOTE)

    def _local(self, job: JobFolder) -> LocalCard:
        env = card_env(self.settings, job.name)
        return LocalCard(self.project, self.card, self.settings.trainer_python, self.stop_seconds, env)

    def _remote(self, job: JobFolder) -> JobBucket:
        return JobBucket(self.bucket, job.name)


def only_one(job: JobFolder) -> AbstractContextManager[None]:
    """Alone in changing the folder: log and progress come from the bucket, or from a trainer that starts here."""
    return alone(job.path / "mirror.lock")


def _is_done(job: JobFolder) -> bool:
    result = job.result()
    return bool(result and result["status"] == "ok")

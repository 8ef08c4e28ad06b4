"""Target: a rented RunPod pod. The job's folder lies in the bucket; the one here mirrors it for all who read it.

What is rented stands in the ledger before RunPod is asked (`jobs/rent.py`), and the pod goes on only until the permit
in its job folder ends, which is what was reserved for it. Whatever dies here, the pod ends by itself.
"""

from __future__ import annotations

import sys
import time
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from jobs.cloud_checks import pod_image
from jobs.pod_env import pod_bucket, pod_env
from jobs.rent import Cloud, Offer, Wish, end_rental, rent
from jobs.targets.target import Poll
from registry.bucket import Bucket
from registry.budgets import paid_seconds, run_cap
from registry.cloud_terms import CloudTerms
from registry.errors import BucketError, BudgetError, CloudError, NotFound
from registry.job_bucket import JobBucket, LeaseWatch, Permit, attempt_of
from registry.job_folder import JobFolder
from registry.ledger import note_pod, reserve_more
from registry.rentals import Rental, current, rentals
from registry.runpod_shapes import VOLUME_PATH, Pod, PodOrder
from registry.settings import Settings
from registry.spending import permit_until
from registry.store import Store

PULL_SECONDS = 2.0
PODS_SECONDS = 10.0  # RunPod allows 60 calls a minute, to all jobs together
PERMIT_SECONDS = 30.0
STOP_SECONDS = 120.0
# A pod that has published its result says when all else is in the bucket; one that says nothing is ended after so long.
SEND_SECONDS = 30.0
# A trainer that was heard so lately is at work, and its run's budget pays for more than the plan expected.
HEARD_SECONDS, LAST_SECONDS, LAST_SHARE = 60.0, 240.0, 0.25
ENDED = ("EXITED", "ERROR", "TERMINATED")
COMMAND = "python -m jobs.pod"


@dataclass(frozen=True)
class Rent:
    """What a run may rent. US dollars: `reserve_usd` for one pod (None: all that is left), `max_usd` for the run.

    `base` is the base model's folder where a pod could not fetch it; `token` is for a gated one. `run`: the run in
    whose folder the job's lies, if the job is not all of it; the ledger and budgets count it there.
    """

    recipe: str
    model: str
    terms: CloudTerms
    offers: tuple[Offer, ...]
    reserve_usd: float | None = None
    max_usd: float | None = None
    base: Path | None = None
    token: str = ""
    run: str = ""


class RunPodPod:
    """One job's pod, and after its loss the next one. `command` is what the pod starts."""

    def __init__(
        self, store: Store, settings: Settings, cloud: Cloud, bucket: Bucket, rent_: Rent, command: str = COMMAND
    ) -> None:
        self.store, self.settings, self.cloud, self.bucket = store, settings, cloud, bucket
        self.rent, self.command = rent_, command
        self._pulled = self._asked = self._permitted = float("-inf")
        self._seen: Pod | None = None
        self._silence = LeaseWatch()
        self._note = self._grown = ""
        self._done: float | None = None

    def launch(self, folder: Path) -> bool:
        job = JobFolder(folder)
        remote = self._remote(job)
        remote.pull(job)
        if _is_done(job) or self._live(job):
            return False
        # An event starts runs without `ft run` and its checks.
        pod_image(self.settings, self.rent.terms)
        with closing(pod_bucket(self.settings)) as theirs:
            theirs.check()
        remote.push(job, self.rent.base)
        order = partial(self._order, job)
        rent(self.store, self.cloud, self._wish(job), order, settle_seconds=self.settings.settle_seconds)
        self._silence, self._seen, self._permitted, self._done = LeaseWatch(), None, float("-inf"), None
        return True

    def poll(self, folder: Path) -> Poll:
        job = JobFolder(folder)
        self._pull(job)
        rental = current(self.store, self._run(job))
        if (result := job.result()) and not self._works_on(job, rental):
            if rental and not self._has_sent_all(job, rental):
                return Poll("running", note="the pod sends what is left")
            if rental:
                self._pulled = float("-inf")  # the last steps may have come after the result
                self._pull(job)
                end_rental(self.store, self.cloud, rental.name, f"the job is {result['status']}")
            return Poll("done", result)
        if rental is None or rental.state != "live":
            note = "a pod is being rented" if rental else "the pod is gone and has left no result"
            return Poll("lost" if job.lease() and not rental else "waiting", note=note)
        if why := self._why_lost(job, rental):
            end_rental(self.store, self.cloud, rental.name, why)
            return Poll("lost", note=why)
        self._permit(job, rental)
        return Poll("running", note=self._note)

    def waits_for(self, folder: Path) -> str:
        rental = current(self.store, self._run(JobFolder(folder)))
        if rental is None:
            return "no pod yet"
        state = self._seen.status.lower() if self._seen else "rented" if rental.pod else "being rented"
        return f"a {rental.gpu} at ${rental.usd_per_hour:.2f} an hour is {state}"

    def fetch(self, folder: Path, target: Path) -> None:
        self._note_pods(JobFolder(folder))
        self._remote(JobFolder(folder)).fetch_adapter(target)

    def cancel(self, folder: Path, reason: str) -> None:
        """Checkpoint, then stop; a pod that does not come to its end in two minutes is ended without."""
        job = JobFolder(folder)
        with suppress(BucketError):  # away: the pod is ended without a checkpoint
            self._remote(job).ask_to_stop(reason)
            self._wait_for_end(job)
        for rental in rentals(self.store, open_=True, job=self._run(job)):
            end_rental(self.store, self.cloud, rental.name, reason)
        with suppress(BucketError):
            self._pulled = float("-inf")
            self._pull(job)
            self._remote(job).withdraw_stop()
        job.withdraw_stop()

    def _wait_for_end(self, job: JobFolder) -> None:
        deadline = time.monotonic() + STOP_SECONDS
        while time.monotonic() < deadline and self.poll(job.path).state == "running":
            time.sleep(PULL_SECONDS / 4)

    def _wish(self, job: JobFolder) -> Wish:
        return Wish(
            job=self._run(job), recipe=self.rent.recipe, model=self.rent.model, offers=self.rent.offers,
            budgets=self.settings.budgets, max_usd_per_hour=self.rent.terms.max_usd_per_hour,
            max_usd=self.rent.max_usd, reserve_usd=self.rent.reserve_usd, disk_gb=self.rent.terms.disk_gb,
        )  # fmt: skip

    def _order(self, job: JobFolder, rental: Rental) -> PodOrder:
        """The order for a rental. Its permit is written first: a pod that finds none ends itself."""
        settings, terms = self.settings, self.rent.terms
        _write_permit(self.store, self._remote(job), rental)
        more = {"HF_TOKEN": self.rent.token} if self.rent.token else {}
        if terms.network_volume:  # base models stay there for the next pod
            more["FT_CACHE"] = f"{VOLUME_PATH}/ft-cache"
        return PodOrder(
            name=rental.name, image=pod_image(settings, terms), gpu=rental.gpu, cloud=rental.cloud,
            env={**pod_env(settings, self._id(job), rental.attempt), **more}, args=self.command, disk_gb=terms.disk_gb,
            data_centers=tuple(terms.data_centers), network_volume=terms.network_volume, min_cuda=terms.min_cuda,
        )  # fmt: skip

    def _pull(self, job: JobFolder) -> None:
        """Bring the mirror up to date, now and then. A bucket that is away is no reason to lose the pod."""
        if time.monotonic() - self._pulled < PULL_SECONDS:
            return
        self._pulled = time.monotonic()
        try:
            self._remote(job).pull(job)
            self._note_pods(job)
            self._note = ""
        except BucketError as error:
            self._note = error.what

    def _note_pods(self, job: JobFolder) -> None:
        """Pods that signed in the bucket: one that was made twice may be gone before a list shows it, and costs."""
        by_attempt = {each.attempt: each for each in rentals(self.store, job=self._run(job))}
        for attempt, pod in self._remote(job).signed():
            if rental := by_attempt.get(attempt):
                note_pod(self.store, rental.name, pod, rental.usd_per_hour, time.time())

    def _works_on(self, job: JobFolder, rental: Rental | None) -> bool:
        """A pod of a later attempt than the one whose result is there: it has not claimed the job yet."""
        held = job.lease()
        return bool(rental and held and rental.attempt > attempt_of(held.lease) and not _is_done(job))

    def _has_sent_all(self, job: JobFolder, rental: Rental) -> bool:
        """Ended with its result's first sight, a stopped pod lost the checkpoint that it was about to send."""
        now = time.monotonic()
        self._done = now if self._done is None else self._done
        with suppress(BucketError):
            if self._remote(job).end_note(rental.attempt) is not None:
                return True
        return now - self._done > SEND_SECONDS

    def _live(self, job: JobFolder) -> bool:
        rental = current(self.store, self._run(job))
        return rental is not None and rental.state == "live"

    def _why_lost(self, job: JobFolder, rental: Rental) -> str:
        """Why the pod will leave no result; '' while it may."""
        held = job.lease()
        claimed = bool(held and attempt_of(held.lease) == rental.attempt)
        if not claimed and time.time() - (rental.created or rental.intended) > self.settings.pod_start_seconds:
            return f"its trainer was not heard for {self.settings.pod_start_seconds:.0f} s after its start"
        if claimed and not self._note and self._silence.is_expired(held):
            return "its trainer is not heard any more"
        if time.monotonic() - self._asked < PODS_SECONDS:
            return ""
        self._asked = time.monotonic()
        return self._why_gone(job, rental)

    def _why_gone(self, job: JobFolder, rental: Rental) -> str:
        assert rental.pod is not None
        try:
            self._seen = self.cloud.pod(rental.pod)
        except CloudError as error:  # a pod may be well while RunPod's API is not
            print(f"pod {rental.pod} cannot be looked at: {error}", file=sys.stderr, flush=True)
            return ""
        if self._seen is not None and self._seen.status not in ENDED:
            return ""
        said = ""
        with suppress(BucketError):
            said = self._remote(job).end_note(rental.attempt) or ""
        state = self._seen.status.lower() if self._seen else "gone"
        return f"the pod is {state}" + (f": {said}" if said else "")

    def _permit(self, job: JobFolder, rental: Rental) -> None:
        """Write how long what was reserved pays for, as it is known now: prices and budgets change."""
        grown = self._lengthened(rental)
        if grown is rental and time.monotonic() - self._permitted < PERMIT_SECONDS:
            return
        with suppress(BucketError):  # then the pod goes by the permit that it has
            _write_permit(self.store, self._remote(job), grown)
            self._permitted = time.monotonic()

    def _lengthened(self, rental: Rental) -> Rental:
        """What was reserved is what the plan expected. A trainer that works, but slower, gets what the run has left."""
        left = permit_until(self.store, rental, now=0.0)
        paid = paid_seconds(rental.reserved_usd, rental.usd_per_hour)
        silent = time.monotonic() - self._silence.since
        if rental.name == self._grown or left > min(LAST_SECONDS, paid * LAST_SHARE) or silent > HEARD_SECONDS:
            return rental
        self._grown = rental.name
        cap = run_cap(self.rent.max_usd, self.settings.budgets, rental.job)
        try:
            return reserve_more(self.store, rental.name, self.settings.budgets, cap)
        except (BudgetError, NotFound):  # it stops with a checkpoint
            return rental

    def _remote(self, job: JobFolder) -> JobBucket:
        return JobBucket(self.bucket, self._id(job))

    def _id(self, job: JobFolder) -> str:
        return f"{self.rent.run}/{job.name}" if self.rent.run else job.name

    def _run(self, job: JobFolder) -> str:
        return self.rent.run or job.name


def _write_permit(store: Store, remote: JobBucket, rental: Rental) -> None:
    now = remote.bucket.now()
    until = permit_until(store, rental, now)
    remote.write_permit(Permit(rental.attempt, until, until))


def _is_done(job: JobFolder) -> bool:
    result = job.result()
    return bool(result and result["status"] == "ok")

"""One job's folder in a bucket, for who trains beyond this machine: the same files, with the lease as compare-and-set.

jobs/<id>/spec.json, attempts/      as in a job folder
jobs/<id>/data.json                 names what is shared; written last, so the job is whole when it is there
jobs/<id>/lease.json                the claim; naming a result's hash in it is the acceptance
jobs/<id>/results/<epoch>/          result.json and adapter/, sent before the lease names them
jobs/<id>/permit.json, stop.json    our side's word to who trains
jobs/<id>/progress/, log/, checkpoints/   sent as they come, each file written once
jobs/<id>/ended/<attempt>.json      why a pod ended itself
jobs/<id>/pods/<attempt>-<pod>      a pod was here
data/, models/, adapters/<sha256>/  by content, shared by jobs; complete with MANIFEST.json
An evaluation's <id> is <run>/evaluate-<n>.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from registry.bucket import AT_ONCE, Bucket, Changed
from registry.errors import BucketError, JobError
from registry.job_folder import Held, JobFolder, Lease, LeaseLost, steps_of, write_whole
from registry.manifest import MANIFEST, broken_files, sha256_of
from registry.whole_folders import fetch_whole, share_folder

# A trainer goes on for half of it without reaching the bucket, so an outage of ten minutes costs nothing.
LEASE_SECONDS = 1200.0
SWAPS = 5
PULLED = ".bucket.json"


@dataclass(frozen=True)
class Permit:
    """Our permission to go on: for pod number `attempt`, `until` and at most to `deadline` on the bucket's clock."""

    attempt: int
    until: float
    deadline: float
    reason: str = ""


class JobBucket:
    """`attempt` is the number of the pod that this process is in, and `pod` its id; 0 and nothing on our own side."""

    def __init__(
        self, bucket: Bucket, job_id: str, attempt: int = 0, term: float = LEASE_SECONDS, pod: str = ""
    ) -> None:
        self.bucket, self.job_id, self.attempt, self.term, self.pod = bucket, job_id, attempt, term, pod
        self.root = f"jobs/{job_id}"

    def lease(self) -> Held | None:
        found = self.bucket.get(f"{self.root}/lease.json")
        return Held(Lease(**json.loads(found.body)), found.etag) if found else None

    def claim(self, owner: str, seen: Held | None) -> Held:
        """Take the job: create the lease, or take over the one `seen`. Raises LeaseLost if another was faster."""
        if seen and (self._is_done(seen.lease) or attempt_of(seen.lease) > self.attempt > 0):
            raise LeaseLost(f"{self.bucket.place}/{self.root}")
        epoch = seen.lease.epoch + 1 if seen else 1
        # No two claims are ever of one name, so who got no answer knows its own lease when it sees it.
        name = f"a{self.attempt}/{self.pod}/{owner}/{uuid.uuid4().hex[:12]}"
        return self._swap(seen, Lease(epoch, name, os.getpid()))

    def renew(self, held: Held) -> Held:
        return self._swap(held, replace(held.lease, beat=held.lease.beat + 1))

    def accept(self, held: Held, result: dict[str, Any], adapter: Path | None = None) -> Held:
        """Send `result` and `adapter`, then name them in the lease: only that counts. Raises LeaseLost."""
        text = json.dumps(result, indent=1, sort_keys=True, ensure_ascii=False).encode()
        folder = f"{self.root}/results/{held.lease.epoch:04d}"
        if adapter:
            self.bucket.send(adapter, f"{folder}/adapter")
        self.bucket.put(f"{folder}/result.json", text)
        return self._swap(held, replace(held.lease, result=hashlib.sha256(text).hexdigest()))

    def push(self, job: JobFolder, base: Path | None = None) -> None:
        """Our side: what to do, and with which data; `base` is the base model's folder where no pod can fetch it."""
        data = share_folder(self.bucket, job.data.resolve(), "data")
        self._write_once("spec.json", (job.path / "spec.json").read_bytes())
        self.send_attempts(job)
        model = share_folder(self.bucket, base, "models") if base else None
        asked = [
            share_folder(self.bucket, each.resolve(), "adapters") for each in sorted((job.path / "adapters").glob("*"))
        ]
        reason = job.stop_reason()
        self.ask_to_stop(reason) if reason else self.withdraw_stop()
        shared = {"data": data, "model": model, **({"adapters": asked} if asked else {})}
        self._write_once("data.json", json.dumps(shared, sort_keys=True).encode())

    def send_attempts(self, job: JobFolder) -> None:
        """What is different by now. One that was decided on again, after a new plan, replaces the one before."""
        for file in sorted((job.path / "attempts").glob("*.json")):
            self.bucket.put(f"{self.root}/attempts/{file.name}", file.read_bytes())

    def pull(self, job: JobFolder) -> None:
        """Our side: lease, progress, log and the accepted result into the local folder, where everything reads them."""
        job.path.mkdir(parents=True, exist_ok=True)
        self._pull_progress(job)
        self._pull_log(job)
        self.pull_lease(job)

    def pull_attempts(self, job: JobFolder) -> None:
        """What another host decided on, before this one decides."""
        job.path.mkdir(parents=True, exist_ok=True)
        self.bucket.fetch(f"{self.root}/attempts", job.path / "attempts")

    def pull_lease(self, job: JobFolder) -> None:
        """Lease and accepted result alone: where the trainer writes log and progress, the bucket's are older."""
        job.path.mkdir(parents=True, exist_ok=True)
        found = self.bucket.get(f"{self.root}/lease.json")
        if found is None:
            return
        # The result before the lease that names it: who sees the lease sees the result.
        lease = Lease(**json.loads(found.body))
        # A result that is here keeps its time, which tells a run that is resumed that it is an old one.
        if lease.result and lease.result != _digest_of(job.path / "result.json") and (text := self._result_text(lease)):
            write_whole(job.path / "result.json", text.decode())
        write_whole(job.path / "lease.json", found.body.decode())

    def result(self) -> dict[str, Any] | None:
        """The accepted result, None while there is none."""
        held = self.lease()
        text = self._result_text(held.lease) if held and held.lease.result else None
        return dict(json.loads(text)) if text else None

    def fetch_adapter(self, target: Path) -> None:
        """The accepted adapter, whole, into `target`. Raises JobError if there is none."""
        if target.is_dir() and not broken_files(target):
            return
        held, result = self.lease(), self.result()
        if held is None or result is None or result["status"] != "ok":
            raise JobError(f"job {self.job_id} has no adapter yet", place=self.bucket.place)
        if not fetch_whole(self.bucket, f"{self.root}/results/{held.lease.epoch:04d}/adapter", target):
            raise BucketError(f"the adapter of job {self.job_id} is damaged in the bucket", place=self.bucket.place,
                              fix=f"`ft resume {self.job_id}` trains it again from its checkpoint")  # fmt: skip

    def write_permit(self, permit: Permit) -> None:
        self.bucket.put(f"{self.root}/permit.json", json.dumps(asdict(permit)).encode())

    def permit(self) -> tuple[Permit, float] | None:
        """With the bucket's clock at this look; None if there is no permit."""
        found = self.bucket.get(f"{self.root}/permit.json")
        return (Permit(**json.loads(found.body)), found.now) if found else None

    def ask_to_stop(self, reason: str) -> None:
        self.bucket.put(f"{self.root}/stop.json", json.dumps({"reason": reason}).encode())

    def withdraw_stop(self) -> None:
        self.bucket.remove(f"{self.root}/stop.json")

    def stop_reason(self) -> str | None:
        found = self.bucket.get(f"{self.root}/stop.json")
        return str(json.loads(found.body)["reason"]) if found else None

    def sign(self) -> None:
        """A pod's side: it was here, whatever becomes of it."""
        self.bucket.put(f"{self.root}/pods/{self.attempt:04d}-{self.pod}", b"")

    def signed(self) -> list[tuple[int, str]]:
        """Attempt and id of every pod that was here."""
        start = f"{self.root}/pods/"
        found = [each.key.removeprefix(start).partition("-") for each in self.bucket.names(start)]
        return [(int(attempt), pod) for attempt, _, pod in found if attempt.isdecimal()]

    def note_end(self, reason: str) -> None:
        """Why this attempt's pod ends itself, for our side."""
        self.bucket.put(f"{self.root}/ended/{self.attempt:04d}.json", json.dumps({"reason": reason}).encode())

    def end_note(self, attempt: int) -> str | None:
        found = self.bucket.get(f"{self.root}/ended/{attempt:04d}.json")
        return str(json.loads(found.body)["reason"]) if found else None

    def fetch_job(self, job: JobFolder) -> None:
        """Who trains: what to do, the data, the newest whole checkpoint. Raises JobError if it is not whole."""
        self.fetch_task(job)
        self._fetch_checkpoint(job)

    def fetch_task(self, job: JobFolder) -> None:
        """What to do, and the data."""
        named = self.bucket.get(f"{self.root}/data.json")
        if named is None:
            raise JobError(f"job {self.job_id} is not (or half) in the bucket", place=self.bucket.place,
                           fix=f"`ft resume {self.job_id.partition('/')[0]}` sends it again")  # fmt: skip
        job.path.mkdir(parents=True, exist_ok=True)
        self.bucket.fetch(self.root, job.path, only=["spec.json"])
        self.bucket.fetch(f"{self.root}/attempts", job.path / "attempts")
        shared = json.loads(named.body)
        if not (job.path / ".data").exists():
            self._fetch_shared(f"data/{shared['data']}", job.data)
            (job.data / MANIFEST).unlink()  # a dataset has no such file
            (job.path / ".data").touch()
        for digest in shared.get("adapters", ()):
            self._fetch_shared(f"adapters/{digest}", job.path / "adapters" / digest)

    def fetch_model(self, target: Path) -> bool:
        """The base model, if our side has sent it; False otherwise."""
        named = self.bucket.get(f"{self.root}/data.json")
        digest = json.loads(named.body).get("model") if named else None
        return bool(digest) and fetch_whole(self.bucket, f"models/{digest}", target)

    def send_checkpoint(self, checkpoint: Path, keep: int = 2) -> None:
        """Files first, the manifest last; then older ones than the newest `keep` are deleted."""
        self.bucket.send(checkpoint, f"{self.root}/checkpoints/{checkpoint.name}")
        for name in self._checkpoints()[keep:]:
            self.bucket.delete(f"{self.root}/checkpoints/{name}")

    def send_part(self, kind: str, name: str, body: bytes) -> None:
        """One part of the `progress` or the `log`; never changed once it is there."""
        self.bucket.put(f"{self.root}/{kind}/{name}", body)

    def forget(self) -> None:
        """Delete all of the job; what it shares with others (data, base models) stays."""
        self.bucket.delete(self.root)

    def _swap(self, seen: Held | None, new: Lease) -> Held:
        """Write `new` over `seen`. An answer that got lost is no loss: our own lease is known by its owner."""
        body = json.dumps(asdict(new), sort_keys=True).encode()
        for turn in range(SWAPS):
            try:
                etag = self.bucket.put(
                    f"{self.root}/lease.json", body, if_match=seen.etag if seen else None, if_absent=seen is None
                )
                return Held(new, etag)
            except Changed:
                now = self.lease()
            if now and now.lease == new:
                return now
            if now != seen and not (now and _is_open(now.lease, new)):
                raise LeaseLost(f"{self.bucket.place}/{self.root}")
            # Ours with a later beat, or nobody's change at all: AWS answers 409 while another write is on.
            seen = now
            time.sleep(0.05 * turn)
        raise BucketError(f"the lease of job {self.job_id} cannot be written", place=self.bucket.place,
                          fix="try again: many writers are at it")  # fmt: skip

    def _is_done(self, lease: Lease) -> bool:
        text = self._result_text(lease) if lease.result else None
        return bool(text) and json.loads(text or b"{}")["status"] == "ok"

    def _result_text(self, lease: Lease) -> bytes | None:
        found = self.bucket.get(f"{self.root}/results/{lease.epoch:04d}/result.json")
        return found.body if found and hashlib.sha256(found.body).hexdigest() == lease.result else None

    def _write_once(self, name: str, body: bytes) -> None:
        try:
            self.bucket.put(f"{self.root}/{name}", body, if_absent=True)
        except Changed:
            found = self.bucket.get(f"{self.root}/{name}")
            if found is None or found.body != body:
                raise BucketError(
                    f"{self.root}/{name} is there already, with other content", place=self.bucket.place,
                    fix="another project uses this bucket: give it a prefix of its own",
                ) from None  # fmt: skip

    def _fetch_shared(self, prefix: str, target: Path) -> None:
        if not fetch_whole(self.bucket, prefix, target):
            raise JobError(f"{prefix} is not whole in the bucket", place=self.bucket.place,
                           fix=f"delete {prefix} there, then `ft resume` the run: it is sent again")  # fmt: skip

    def _checkpoints(self) -> list[str]:
        """Names of the complete ones, most steps first."""
        start = f"{self.root}/checkpoints/"
        keys = [each.key.removeprefix(start) for each in self.bucket.names(start)]
        names = [key.removesuffix(f"/{MANIFEST}") for key in keys if key.endswith(f"/{MANIFEST}")]
        return sorted(names, key=lambda name: steps_of(Path(name)), reverse=True)

    def _fetch_checkpoint(self, job: JobFolder) -> None:
        # Of a job that begins anew, what earlier trainers saved does not count.
        begun = max((each["after"] for each in job.attempts() if each.get("anew")), default=0)
        for old in [each for each in job.checkpoints.glob("*-*") if steps_of(each)[1] <= begun]:
            shutil.rmtree(old, ignore_errors=True)
        here = {each.name for each in job.complete_checkpoints()}
        for name in self._checkpoints():
            if steps_of(Path(name))[1] > begun and (
                name in here or fetch_whole(self.bucket, f"{self.root}/checkpoints/{name}", job.checkpoints / name)
            ):
                return

    def _pull_progress(self, job: JobFolder) -> None:
        # Fetched in parallel: who is killed in it leaves gaps among the newest only, and those are looked at again.
        here = [each.name for each in job.progress_files()]
        start = f"{self.root}/progress/"
        found = self.bucket.names(start, after=start + here[-AT_ONCE] if len(here) >= AT_ONCE else "")
        missing = sorted({each.key.removeprefix(start) for each in found}.difference(here))
        for first in range(0, len(missing), AT_ONCE):
            self.bucket.fetch(start, job.path / "progress", only=missing[first : first + AT_ONCE])

    def _pull_log(self, job: JobFolder) -> None:
        """Append the parts that are new. Killed between the log and its note, the next look cuts the log back first."""
        start, note = f"{self.root}/log/", job.path / PULLED
        if not note.exists():
            write_whole(note, json.dumps({"after": "", "size": job.log.stat().st_size if job.log.exists() else 0}))
        had: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
        for part in self.bucket.names(start, after=had["after"]):
            found = self.bucket.get(part.key)
            if found is None:
                continue
            with job.log.open("ab") as log:
                log.truncate(had["size"])
                log.write(found.body)
            had = {"after": part.key, "size": had["size"] + len(found.body)}
            write_whole(note, json.dumps(had))


class LeaseWatch:
    """Expiry of a lease: its ETag has not changed for the term on our own clock. Clocks are never compared."""

    def __init__(self, term: float = LEASE_SECONDS, clock: Callable[[], float] = time.monotonic) -> None:
        self.term, self.clock = term, clock
        self.etag, self.since, self.looked = "", clock(), clock()

    def is_expired(self, held: Held | None) -> bool:
        """To be asked again and again, with the lease as it is. A time in which nobody looked does not count."""
        etag, now = held.etag if held else "", self.clock()
        gap, self.looked = now - self.looked, now
        if etag != self.etag or gap > self.term / 4:
            self.etag, self.since = etag, now
        return now - self.since > self.term


def attempt_of(lease: Lease) -> int:
    """The number of the pod that claimed it."""
    number = lease.owner.partition("/")[0].removeprefix("a")
    return int(number) if number.isdecimal() else 0


def pod_of(lease: Lease) -> str:
    """The id of the pod that claimed it: two pods of one attempt are started when RunPod's answer was lost."""
    return lease.owner.partition("/")[2].partition("/")[0]


def _digest_of(file: Path) -> str:
    return sha256_of(file) if file.exists() else ""


def _is_open(lease: Lease, new: Lease) -> bool:
    """Is it the same trainer's own lease, with no result yet? Then its earlier write was done without an answer."""
    return (lease.epoch, lease.owner, lease.result) == (new.epoch, new.owner, None)

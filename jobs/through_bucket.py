"""What goes through the bucket where a run is led from one folder and its card is a host's that works in another.

The job goes there with its plan, log and progress come back while it is done, the adapter when it is. Before an
evaluation the adapters that are compared go there by content. Each can be repeated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobs.job_base import base_here
from jobs.steps import Bench, State
from jobs.target_of import base_to_send, bucket_of
from jobs.targets.bucket_card import NOTE, only_one
from registry import adapters
from registry.errors import BucketError
from registry.folders import folder_id, is_away, leads
from registry.hosts import HostCard
from registry.job_bucket import JobBucket
from registry.job_folder import JobFolder
from registry.manifest import manifest_digest
from registry.recipe import Finetune
from registry.whole_folders import fetch_whole, share_folder

BUCKET = "bucket"
ADAPTERS = "adapters"


def way_to(bench: Bench, run_id: str, card: HostCard) -> State:
    """How the job gets to its card, for the plan. What once went through the bucket does so again, on any card.

    Otherwise a trainer that lives on behind a cut cable, and one that began here, would both be accepted.
    """
    here = folder_id(bench.project.home)
    through = is_away(card.folder, here) or bench.run(run_id).result.get("through") == BUCKET
    return {"through": BUCKET if through else "", "folder": card.folder or here}


def look_back(bench: Bench, run_id: str) -> None:
    """Before a job is planned again: what trainers elsewhere came to."""
    if bench.run(run_id).result.get("through") == BUCKET:
        job, remote = _job(bench, run_id)
        remote.pull_attempts(job)
        remote.pull_lease(job)


def send_job(bench: Bench, run_id: str, recipe: Finetune, base: dict[str, Any]) -> None:
    job, remote = _job(bench, run_id)
    remote.push(job, base_to_send(bench.project, recipe, base))


def pull_here(bench: Bench, run_id: str) -> None:
    """Log, progress, lease and result, unless a trainer writes them in this very folder."""
    job, remote = _job(bench, run_id)
    with only_one(job):
        if is_lent(bench, bench.run(run_id).result):
            (job.path / NOTE).unlink(missing_ok=True)  # of a trainer here: what comes now was written after it
            remote.pull(job)


def is_lent(bench: Bench, planned: dict[str, Any]) -> bool:
    """Is the card one of another folder's host? `planned` is a plan, or what the run's row keeps of it."""
    return planned.get("through") == BUCKET and is_away(planned["folder"], folder_id(bench.project.home))


def bring_adapter(bench: Bench, run_id: str) -> None:
    """All that training has left, with its accepted adapter, into the job's folder."""
    pull_here(bench, run_id)
    job, remote = _job(bench, run_id)
    remote.fetch_adapter(job.adapter)


def share_adapters(bench: Bench, version: State) -> State:
    """Send the version and the champion of now; the version with the digests by which they are found."""
    champion = adapters.aliases(bench.store, version["model"]).get("champion")
    numbers = {version["version"], *([champion] if champion else [])}
    sent = {str(number): _share(bench, version["model"], number) for number in sorted(numbers)}
    return {**version, "champion": champion, "adapters": sent}


def bring_for_evaluation(bench: Bench, run_id: str, version: State) -> None:
    """The test rows, the base model and the adapters, on a host that only lends its card."""
    job, remote = _job(bench, run_id)
    remote.fetch_task(job)
    base_here(remote, job)
    for number, digest in version["adapters"].items():
        _fetch(bench, _folder(bench, version["model"], int(number)), digest)


def lends(bench: Bench) -> bool:
    """Does this host work in a folder that only lends its cards?"""
    return not leads(bench.project, bench.store)


def _share(bench: Bench, model: str, number: int) -> str:
    return share_folder(bucket_of(bench.settings), _folder(bench, model, number), ADAPTERS)


def _fetch(bench: Bench, target: Path, digest: str) -> None:
    # Compared, because a folder of that name may be left of another database.
    if (target / "MANIFEST.json").exists() and manifest_digest(target) == digest:
        return
    bucket = bucket_of(bench.settings)
    target.parent.mkdir(parents=True, exist_ok=True)
    if not fetch_whole(bucket, f"{ADAPTERS}/{digest}", target):
        raise BucketError(f"{ADAPTERS}/{digest} is not whole in the bucket", place=bucket.place,
                          fix="delete it there, then `ft resume` the run: it is sent again")  # fmt: skip


def _folder(bench: Bench, model: str, number: int) -> Path:
    version = adapters.get_version(bench.store, model, number)
    adapters.refuse_pruned(model, number, version.pruned)
    return bench.project.home / version.folder


def _job(bench: Bench, run_id: str) -> tuple[JobFolder, JobBucket]:
    return JobFolder(bench.project.job_folder(run_id)), JobBucket(bucket_of(bench.settings), run_id)

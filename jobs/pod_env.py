"""What a job's pod gets of us: its environment, with a key that reaches the bucket of job folders and nothing else.

And how the pod reads it: `job_of_pod` in a pod, `claims_of` in the trainer that a pod starts. `card_env` is for a
trainer on a card of ours that has no folder in common with who reads its result.
"""

from __future__ import annotations

import os

from registry.bucket import Bucket, open_bucket
from registry.errors import BucketError
from registry.job_bucket import LEASE_SECONDS, JobBucket
from registry.job_folder import Claims, JobFolder
from registry.settings import Settings

IN_BUCKET = {"FT_CLAIMS": "bucket"}


def pod_bucket(settings: Settings) -> Bucket:
    """The bucket with the key that pods get. Raises BucketError if there is none, or if it is our own."""
    key, secret = _pods_key(settings)
    return open_bucket(settings.model_copy(update={"s3_access_key": key, "s3_secret_key": secret}))


def pod_env(settings: Settings, job_id: str, attempt: int) -> dict[str, str]:
    """The environment of a job's pod: where its job lies, and the pods' own key. Nothing of the account is in it."""
    key, secret = _pods_key(settings)
    return {
        "FT_JOB": job_id,
        "FT_ATTEMPT": str(attempt),
        "FT_BUCKET": settings.bucket,
        "FT_S3_ENDPOINT": settings.s3_endpoint,
        "FT_S3_REGION": settings.s3_region,
        "FT_S3_ACCESS_KEY": key,
        "FT_S3_SECRET_KEY": secret,
        "FT_RUNPOD_URL": settings.runpod_url,
        "FT_POD_START_SECONDS": str(settings.pod_start_seconds),
    }


def card_env(settings: Settings, job_id: str) -> dict[str, str]:
    """The environment of a trainer on a card of ours whose job is in the bucket: it claims it there, with our key."""
    return {
        **IN_BUCKET,
        "FT_JOB": job_id,
        "FT_ATTEMPT": "0",
        "FT_BUCKET": settings.bucket,
        "FT_S3_ENDPOINT": settings.s3_endpoint,
        "FT_S3_REGION": settings.s3_region,
        "FT_S3_ACCESS_KEY": settings.s3_access_key,
        "FT_S3_SECRET_KEY": settings.s3_secret_key,
    }


def job_of_pod() -> JobBucket:
    """The job of the pod that this process is in. Raises BucketError where that is none."""
    job, attempt = os.environ.get("FT_JOB", ""), os.environ.get("FT_ATTEMPT", "")
    if not job or not attempt.isdecimal():
        raise BucketError("this is no pod: FT_JOB and FT_ATTEMPT are not set", place="environment",
                          fix="`ft run` a recipe with `cloud:`; it starts the pod")  # fmt: skip
    term = float(os.environ.get("FT_LEASE_SECONDS") or LEASE_SECONDS)
    return JobBucket(open_bucket(Settings()), job, int(attempt), term, os.environ.get("RUNPOD_POD_ID", ""))


def claims_of(job: JobFolder) -> Claims:
    """Where the trainer of this folder claims its job: in the bucket, if who started it said so; in the folder else."""
    return job_of_pod() if IN_BUCKET.items() <= os.environ.items() else job


def _pods_key(settings: Settings) -> tuple[str, str]:
    fix = (
        "make a key that reaches this bucket only, and set it as FT_POD_S3_ACCESS_KEY and FT_POD_S3_SECRET_KEY in .env"
    )
    key, secret = settings.pod_s3_access_key, settings.pod_s3_secret_key
    if not key or not secret:
        raise BucketError("pods have no key for the bucket", place="pod_s3_access_key, pod_s3_secret_key", fix=fix)
    own = {settings.s3_access_key, settings.s3_secret_key, os.environ.get("AWS_ACCESS_KEY_ID", ""),
           os.environ.get("AWS_SECRET_ACCESS_KEY", "")}  # fmt: skip
    if key in own or secret in own:
        raise BucketError("the key for pods is our own key: a pod is somebody else's machine",
                          place="pod_s3_access_key, pod_s3_secret_key", fix=fix)  # fmt: skip
    return key, secret

"""Adapters onto a RunPod network volume, by the S3 API that RunPod has for volumes of many data centers.

The volume's id is the bucket's name, and what lies there as `adapters/x` a worker sees as `/runpod-volume/adapters/x`
(docs.runpod.io/storage/s3-api, August 2026). It has keys of its own; there are no presigned addresses.
"""

from __future__ import annotations

import os
import re

from registry.adapters import Version, refuse_pruned
from registry.bucket import Bucket
from registry.endpoints import ADAPTER_PATH, VOLUME, adapter_path
from registry.errors import AdmissionError, BucketError, WrongInput
from registry.manifest import MANIFEST, broken_files, read_manifest
from registry.project import Project
from registry.settings import Settings

KEYS = ("RUNPOD_S3_ACCESS_KEY", "RUNPOD_S3_SECRET_KEY")
KEYS_FIX = f"set {KEYS[0]} and {KEYS[1]} in .env to an S3 API key (RunPod's console, Settings, S3 API Keys)"
DATA_CENTER = re.compile(r"[A-Z]{2,3}-[A-Z]{2,3}-\d{1,2}")


def upload_adapter(
    project: Project, settings: Settings, version: Version, volume: str, data_center: str,
    template: str = ADAPTER_PATH, url: str = "",
) -> str:  # fmt: skip
    """Where a worker finds it then. The manifest goes last, so a folder with one is whole. May be repeated.

    Raises WrongInput, AdmissionError for files that are not as they were registered, BucketError, NotFound.
    """
    path = adapter_path(template, version.model, version.version, volume=volume, own_image=False)
    if not path.startswith(VOLUME):
        raise WrongInput("is not on a network volume", place=f"--adapter-path {template}", fix=f"write {ADAPTER_PATH}")
    refuse_pruned(version.model, version.version, version.pruned)
    folder = project.home / version.folder
    if broken := broken_files(folder):
        raise AdmissionError(f"{version.name} is not as it was registered: {', '.join(broken)}", place=str(folder))
    names = [*(read_manifest(folder) or {"files": {}})["files"], MANIFEST]
    try:
        _volume(settings, volume, data_center, url).send(folder, path.removeprefix(VOLUME), only=names)
    except BucketError as error:
        raise BucketError(error.what, place=error.place, fix=KEYS_FIX) from error
    return path


def _volume(settings: Settings, volume: str, data_center: str, url: str) -> Bucket:
    access, secret = (os.environ.get(name, "") for name in KEYS)
    if not access or not secret:
        raise BucketError("there is no key for RunPod's S3 API", place=", ".join(KEYS), fix=KEYS_FIX)
    if not DATA_CENTER.fullmatch(data_center):
        raise WrongInput(
            f"no data center: {data_center!r}", place="--data-center", fix="write it as RunPod does: EU-RO-1"
        )
    keys = {
        "s3_endpoint": url or f"https://s3api-{data_center.lower()}.runpod.io", "s3_region": data_center,
        "s3_access_key": access, "s3_secret_key": secret,
    }  # fmt: skip
    return Bucket(volume, "", settings.model_copy(update=keys))

"""Folders in a bucket that are whole or not there: each with a MANIFEST.json, sent last and checked when fetched."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from registry.bucket import Bucket
from registry.manifest import MANIFEST, broken_files, manifest_bytes, sha256_of


def share_folder(bucket: Bucket, folder: Path, kind: str) -> str:
    """Send a folder to KIND/ unless the same content is there; its digest, which is its name."""
    kept = None if (folder / MANIFEST).exists() else manifest_bytes(folder)
    digest = hashlib.sha256(kept).hexdigest() if kept else sha256_of(folder / MANIFEST)
    if bucket.get(f"{kind}/{digest}/{MANIFEST}") is None:
        bucket.send(folder, f"{kind}/{digest}")
        if kept:
            bucket.put(f"{kind}/{digest}/{MANIFEST}", kept)
    return digest


def fetch_whole(bucket: Bucket, prefix: str, target: Path) -> bool:
    """A folder with a manifest into `target`; False if it is not complete or not as its manifest says."""
    if bucket.get(f"{prefix}/{MANIFEST}") is None:
        return False
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    bucket.fetch(prefix, partial)
    if broken_files(partial):
        shutil.rmtree(partial, ignore_errors=True)
        return False
    shutil.rmtree(target, ignore_errors=True)
    partial.replace(target)
    return True

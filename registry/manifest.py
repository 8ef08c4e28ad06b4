"""MANIFEST.json: the sha256 of every file of a folder, written last, so that its presence means 'complete'."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MANIFEST = "MANIFEST.json"


def write_manifest(folder: Path, **facts: Any) -> str:
    """Hash all files below `folder` and write its manifest with `facts`; the manifest's own sha256 (hex)."""
    files = {name: sha256_of(folder / name) for name in _names(folder)}
    text = json.dumps({"files": files, **facts}, indent=1, sort_keys=True, ensure_ascii=False)
    partial = folder / (MANIFEST + ".partial")
    with partial.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    partial.replace(folder / MANIFEST)
    return hashlib.sha256(text.encode()).hexdigest()


def manifest_bytes(folder: Path) -> bytes:
    """As of a manifest without facts, for a folder that gets no such file."""
    names = sorted(each.relative_to(folder).as_posix() for each in folder.rglob("*") if each.is_file())
    return json.dumps({"files": {name: sha256_of(folder / name) for name in names}}, sort_keys=True).encode()


def content_digest(folder: Path, names: Sequence[str]) -> str:
    """sha256 (hex) over the names and contents of some of a folder's files."""
    files = {name: sha256_of(folder / name) for name in names}
    return hashlib.sha256(json.dumps(files, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest's content, None where there is none or it cannot be read."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and isinstance(content.get("files"), dict) else None


def manifest_digest(folder: Path) -> str:
    """sha256 (hex) of the manifest file, and so of everything it lists."""
    return sha256_of(folder / MANIFEST)


def broken_files(folder: Path) -> list[str]:
    """What differs from the manifest: changed, missing and unlisted files; ['MANIFEST.json'] if there is none."""
    manifest = read_manifest(folder)
    if manifest is None:
        return [MANIFEST]
    files: dict[str, str] = manifest["files"]
    listed = [name for name, digest in files.items() if not _is(folder / name, digest)]
    return sorted({*listed, *(name for name in _names(folder) if name not in files)})


def sha256_of(path: Path) -> str:
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def _names(folder: Path) -> list[str]:
    found = (each.relative_to(folder).as_posix() for each in folder.rglob("*") if each.is_file())
    return sorted(name for name in found if not name.startswith(MANIFEST))


def _is(path: Path, digest: str) -> bool:
    return path.is_file() and sha256_of(path) == digest

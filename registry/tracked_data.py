"""What DVC's records (datasets/*.dvc, dvc.lock) say of datasets. Plain YAML: importing DVC takes 0.4 s."""

from __future__ import annotations

import difflib
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from registry.errors import DataError
from registry.project import Project

UNSETTLED_SECONDS = 2.0


@dataclass(frozen=True)
class Tracked:
    """A folder that DVC knows: its hash when it was last tracked, and the file that says so."""

    path: str
    hash: str
    by: str

    @property
    def is_made(self) -> bool:
        """Made by a stage of dvc.yaml, not added by hand."""
        return self.by == "dvc.lock"

    @property
    def ways_out(self) -> str:
        """What a person can do about changes in the folder that DVC does not know."""
        keep = "`dvc commit -f` keeps" if self.is_made else f"`dvc add {self.path}` keeps"
        return f"{keep} the changes as a new version; `dvc checkout -f {self.path}` drops them"


def tracked_datasets(project: Project) -> list[Tracked]:
    """All folders below datasets/ that DVC tracks: by a .dvc file each, or as outputs in dvc.lock."""
    found = [*_added(project.root), *_made(project.root)]
    return sorted((each for each in found if each.path.startswith("datasets/")), key=lambda each: each.path)


def find_tracked(project: Project, path: str) -> Tracked:
    wanted = os.path.normpath(path)
    known = {each.path: each for each in [*_added(project.root), *_made(project.root)]}
    if wanted in known:
        return known[wanted]
    folder = project.root / wanted  # an absolute path stays what it is
    if wanted.startswith("..") or not folder.is_relative_to(project.root):
        raise DataError("lies outside of the project", place=path, fix="datasets are folders below datasets/")
    if is_stage_output(project.root, wanted):
        raise DataError("dvc.yaml has a stage for it that never ran", place=path, fix="`dvc repro` makes it")
    if folder.is_dir():
        raise DataError("DVC does not track it, so a run cannot pin it", place=path, fix=f"`dvc add {wanted}`")
    near = difflib.get_close_matches(wanted, known, n=1)
    there = f"did you mean {near[0]}?" if near else f"there is: {', '.join(sorted(known)) or 'none yet'}"
    raise DataError("no such dataset", place=path, fix=f"{there} (`ft data add NAME FILE` makes one)")


def _added(root: Path) -> Iterator[Tracked]:
    for file in sorted((root / "datasets").glob("**/*.dvc")):
        by = file.relative_to(root).as_posix()
        loaded = _yaml(file)
        base = PurePosixPath(by).parent / str(loaded.get("wdir", "."))
        for out in loaded.get("outs") or []:
            yield from _folder_out(os.path.normpath(base / str(out.get("path"))), out, by)


def _made(root: Path) -> Iterator[Tracked]:
    stages = _yaml(root / "dvc.lock").get("stages") or {}
    for stage in stages.values():
        for out in stage.get("outs") or []:
            yield from _folder_out(os.path.normpath(str(out.get("path"))), out, "dvc.lock")


def _folder_out(path: str, out: dict[str, Any], by: str) -> Iterator[Tracked]:
    if str(out.get("md5", "")).endswith(".dir"):
        yield Tracked(path, out["md5"], by)


def is_stage_output(root: Path, path: str) -> bool:
    stages = _yaml(root / "dvc.yaml").get("stages") or {}
    outs = [out for stage in stages.values() for out in stage.get("outs") or []]
    return path in [os.path.normpath(next(iter(out)) if isinstance(out, dict) else str(out)) for out in outs]


def _yaml(path: Path) -> dict[str, Any]:
    """The file's mapping, parsed again only when it has changed: a worker looks every two seconds."""
    try:
        found = path.stat()
    except OSError:
        return {}
    if not stat.S_ISREG(found.st_mode):
        return {}
    # Written so lately, a second change could leave time and size as they are: a hash is as long as another.
    settled = time.time() - found.st_mtime > UNSETTLED_SECONDS
    stamp = (found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size)
    return _parsed(path, stamp) if settled else _parsed.__wrapped__(path, stamp)


@lru_cache(maxsize=4096)
def _parsed(path: Path, _stamp: tuple[int, ...]) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError("not valid YAML, so DVC's records cannot be read", place=str(path)) from error
    return loaded if isinstance(loaded, dict) else {}

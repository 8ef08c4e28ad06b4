"""Dataset versions: DVC-tracked folders, pinned by DVC's hash and handed out as exactly those bytes.

`store_version` tracks a new version, `pin` says which one a folder is, `materialise` puts its bytes anywhere.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from registry.chat_data import check_dataset
from registry.dvc_repo import cached_path, opened, pull_objects
from registry.errors import Conflict, DataError, Trouble
from registry.file_locks import alone
from registry.project import Project
from registry.tracked_data import Tracked, find_tracked, is_stage_output, tracked_datasets

if TYPE_CHECKING:
    from dvc.repo import Repo


@dataclass(frozen=True)
class Pinned:
    """One dataset version: `path` in the project, DVC's `hash` of the folder, md5 of each file.

    `rows` counts those of each split. JSON by `dataclasses.asdict`, back by `Pinned(**found)`.
    """

    path: str
    hash: str
    files: dict[str, str]
    rows: dict[str, int]


def pin(project: Project, path: str) -> Pinned:
    """The version that the dataset `path` is at. Raises DataError for what could not be trained on."""
    tracked = find_tracked(project, path)
    folder = project.root / tracked.path
    if not folder.is_dir():
        return _pin_unseen(project, tracked)
    files = content(folder)
    if hash_of(files) != tracked.hash:
        files = _content_by_dvc(project, folder)  # knows what .dvcignore leaves out
    if hash_of(files) != tracked.hash:
        raise DataError("changed since it was last tracked", place=tracked.path, fix=tracked.ways_out)
    return Pinned(tracked.path, tracked.hash, files, check_dataset(folder))


def materialise(project: Project, pinned: Pinned, target: Path) -> None:
    """Make `target` a folder of exactly the version's files, whole or not at all; done if it is that already.

    The bytes come from DVC's cache, else from the working copy, else from the default remote, and each file's
    md5 is checked. Raises DataError where none of them has the bytes.
    """
    if target.is_dir() and content(target) == pinned.files:
        return
    partial = target.with_name(f".{target.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        partial.mkdir(parents=True)
        with opened(project.root) as repo:
            _fill(repo, project, pinned, partial)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    except OSError as error:
        raise Trouble(f"the dataset cannot be put here: {error.strerror}", place=str(target)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def store_version(project: Project, name: str, write: Callable[[Path], None], *, replace: bool) -> Pinned:
    """Let `write` fill a new folder, make it datasets/NAME and track it; all is as before if anything fails.

    Raises Conflict where NAME is there and `replace` was not said, or its folder has changes that DVC lacks.
    """
    path, folder = f"datasets/{name}", project.root / "datasets" / name
    with alone(project.home / "datasets.lock"), _staging(folder) as partial:
        _refuse_overwrite(project, path, replace=replace)
        write(partial)
        check_dataset(partial)
        with _swapped_in(partial, folder), opened(project.root) as repo:
            repo.add(str(folder))
    return pin(project, path)


def track(project: Project, path: str) -> Pinned:
    """The folder as it is now, as the dataset's newest version; the version that it is at where nothing has changed.

    Raises DataError for what could not be trained on, and where a stage of dvc.yaml makes the folder.
    """
    tracked = find_tracked(project, path)
    folder = project.root / tracked.path
    if folder.is_dir() and hash_of(content(folder)) != tracked.hash and not tracked.is_made:
        check_dataset(folder)
        with alone(project.home / "datasets.lock"), opened(project.root) as repo:
            repo.add(str(folder))
    return pin(project, path)


def push(project: Project, pinned: Pinned) -> str | None:
    """Copy the version to the default remote; the remote's name, None where none is configured."""
    with opened(project.root) as repo:
        remote = repo.config["core"].get("remote")
        if remote:
            repo.push(targets=[str(project.root / pinned.path)])
        return str(remote) if remote else None


def content(folder: Path) -> dict[str, str]:
    """md5 of each file below the folder, by its relative POSIX path."""
    files = sorted(each for each in folder.rglob("*") if each.is_file())
    return {each.relative_to(folder).as_posix(): _md5(each) for each in files}


def hash_of(files: dict[str, str]) -> str:
    """DVC's hash of a folder with these files."""
    listing = [{"md5": files[name], "relpath": name} for name in sorted(files)]
    return hashlib.md5(json.dumps(listing, sort_keys=True).encode(), usedforsecurity=False).hexdigest() + ".dir"


def _content_by_dvc(project: Project, folder: Path) -> dict[str, str]:
    with opened(project.root) as repo:
        from dvc.fs import localfs
        from dvc_data.hashfile.build import build

        _, _, tree = build(repo.cache.local, str(folder), localfs, "md5", dry_run=True, ignore=repo.dvcignore)
        return {"/".join(key): hash_info.value for key, _, hash_info in tree}


def _pin_unseen(project: Project, tracked: Tracked) -> Pinned:
    """The folder is not there: read the version from the cache or the remote, in passing."""
    with opened(project.root) as repo:
        files = _listing(repo, tracked)
    look = project.home / "tmp" / f"dataset-{uuid.uuid4().hex[:8]}"
    try:
        materialise(project, Pinned(tracked.path, tracked.hash, files, {}), look)
        return Pinned(tracked.path, tracked.hash, files, check_dataset(look))
    finally:
        shutil.rmtree(look, ignore_errors=True)


def _listing(repo: Repo, tracked: Tracked) -> dict[str, str]:
    listing = cached_path(repo, tracked.hash)
    if not listing.is_file():
        pull_objects(repo, [tracked.hash])
    if not listing.is_file():
        raise DataError(
            f"version {tracked.hash} is neither here nor in DVC's cache or remote",
            place=tracked.path,
            fix="`dvc repro` makes it" if tracked.is_made else "ask who has it to `dvc push` it",
        )
    return {each["relpath"]: each["md5"] for each in json.loads(listing.read_text(encoding="utf-8"))}


def _fill(repo: Repo, project: Project, pinned: Pinned, partial: Path) -> None:
    lacking = [name for name in pinned.files if not _copy_local(repo, project, pinned, name, partial)]
    if lacking:
        pull_objects(repo, [pinned.files[name] for name in lacking])
        lacking = [name for name in lacking if not _copy_local(repo, project, pinned, name, partial)]
    if lacking:
        raise DataError(
            f"{', '.join(lacking)} of version {pinned.hash} is neither in DVC's cache nor in its remote",
            place=pinned.path,
            fix="`dvc push` where the bytes still are, or run on the version that is there now",
        )


def _copy_local(repo: Repo, project: Project, pinned: Pinned, name: str, partial: Path) -> bool:
    """Copy one file from the cache or the working copy; False where neither has its bytes."""
    target, md5 = partial / name, pinned.files[name]
    if not target.resolve().is_relative_to(partial.resolve()):
        raise DataError(f"names a file outside of itself: {name}", place=pinned.path)
    target.parent.mkdir(parents=True, exist_ok=True)
    cached = cached_path(repo, md5)
    for source in (cached, project.root / pinned.path / name):
        if source.is_file():
            shutil.copyfile(source, target)
            if _md5(target) == md5:
                return True
            if source == cached:
                cached.unlink()  # DVC never looks again at an object that it has, so a broken one would stay
    target.unlink(missing_ok=True)
    return False


def _refuse_overwrite(project: Project, path: str, *, replace: bool) -> None:
    tracked = {each.path: each for each in tracked_datasets(project)}.get(path)
    if is_stage_output(project.root, path):
        raise Conflict("made by a stage of dvc.yaml", place=path, fix="choose another name, or change the stage")
    folder = project.root / path
    if tracked is None and folder.exists():
        raise Conflict(
            "is there, and DVC does not track it", place=path, fix=f"`dvc add {path}`, or choose another name"
        )
    if tracked is None:
        return
    if not replace:
        raise Conflict("is there already", place=path, fix="--replace makes a new version; the old one stays in DVC")
    if folder.is_dir() and hash_of(content(folder)) != tracked.hash != hash_of(_content_by_dvc(project, folder)):
        raise Conflict(
            "has changes that DVC does not know, and they would be lost",
            place=path,
            fix=tracked.ways_out,
        )


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an import that was killed
    try:
        partial.mkdir(parents=True)
        yield partial
    except OSError as error:
        raise Trouble(f"the dataset cannot be written: {error.strerror}", place=str(folder)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _swapped_in(partial: Path, folder: Path) -> Iterator[None]:
    """`partial` stands where `folder` was; if the block fails, all is as before."""
    old = folder.with_name(f".{folder.name}.old")
    records = {path: _bytes(path) for path in (folder.with_name(f"{folder.name}.dvc"), folder.parent / ".gitignore")}
    shutil.rmtree(old, ignore_errors=True)
    try:
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        yield
    except BaseException:
        if old.exists() or not partial.exists():
            shutil.rmtree(folder, ignore_errors=True)
        if old.exists():
            old.rename(folder)
        for path, before in records.items():
            _restore(path, before)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _restore(path: Path, before: bytes | None) -> None:
    if before is None:
        path.unlink(missing_ok=True)
    elif path.read_bytes() != before:
        path.write_bytes(before)


def _md5(path: Path) -> str:
    with path.open("rb") as source:
        return hashlib.file_digest(source, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()

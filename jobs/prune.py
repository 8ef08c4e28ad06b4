"""Pruning: looks what there is, has `registry/retention.py` decide, and deletes. `ft prune` and the worker call it.

It may be killed anywhere. What goes is given up in the store first and deleted then, folders after a rename; what is
left over has a name that nobody reads, or is known as given up, and the next prune deletes it. MLflow is left alone.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from registry import pruned_rows as rows
from registry.bucket import open_bucket
from registry.cards import holder, list_cards, pick_card, wanted
from registry.errors import Conflict, Trouble
from registry.events import append, new_event
from registry.file_locks import try_exclusive
from registry.job_bucket import JobBucket
from registry.project import Project, user_name
from registry.retention import EndedRun, Keep, Known, Plan, decide
from registry.settings import load_settings
from registry.store import Store
from serving.server_record import loaded_lately

DAY = 86400.0
GONE = ".pruned-"
WORKFLOWS_AT_ONCE = 200


@dataclass
class Count:
    """How many, and how many bytes."""

    number: int = 0
    bytes: int = 0

    def delete(self, path: Path, failed: list[str]) -> None:
        """Delete the folder and count it; what cannot be deleted keeps nobody from the rest."""
        try:
            self.add(1, _delete(path))
        except OSError as error:
            failed.append(f"{error.filename or path}: {error.strerror}")

    def add(self, number: int, size: int) -> None:
        self.number, self.bytes = self.number + number, self.bytes + size


@dataclass
class Counts:
    """What would go, or has gone. `leftovers` are folders that an earlier prune did not come to."""

    runs: Count = field(default_factory=Count)
    jobs: Count = field(default_factory=Count)
    checkpoints: Count = field(default_factory=Count)
    adapters: Count = field(default_factory=Count)
    scores: Count = field(default_factory=Count)
    events: Count = field(default_factory=Count)
    logs: Count = field(default_factory=Count)
    leftovers: Count = field(default_factory=Count)

    def as_dict(self) -> dict[str, dict[str, int]]:
        return asdict(self)

    @property
    def total(self) -> Count:
        found = [Count(**each) for each in self.as_dict().values()]
        return Count(sum(each.number for each in found), sum(each.bytes for each in found))


def plan_of(project: Project, store: Store, keep: Keep, now: float) -> Plan:
    """What has had its time."""
    loaded = loaded_lately(store, now)
    known = Known(
        runs=tuple(_with_folder(project, run) for run in rows.ended_runs(store)),
        versions=tuple(rows.known_versions(store, loaded, now)),
        busy=rows.busy_runs(store),
        passed=rows.passed_by_all(store, [each.name for each in load_settings(project).sinks]),
    )
    found = decide(keep, known, now)
    cards = list({card.name: card for card in [*list_cards(), pick_card("cpu")]}.values())
    held = {Path(holder(project, card)).name for card in cards}  # trainers that live, whatever their runs' rows say
    is_evaluating = any(wanted(project, card, "eval") for card in cards)  # vLLM may read an adapter again at any time
    return replace(
        found,
        runs=_without(found.runs, held), jobs=_without(found.jobs, held), checkpoints=_without(found.checkpoints, held),
        adapters=() if is_evaluating else found.adapters,
    )  # fmt: skip


def preview(project: Project, store: Store, plan: Plan) -> Counts:
    """How much it is; nothing is changed."""
    found = Counts()
    for count, paths in (
        (found.runs, [project.job_folder(each) for each in plan.runs]),
        (found.jobs, [project.job_folder(each) for each in plan.jobs]),
        (found.checkpoints, [project.job_folder(each) / "checkpoints" for each in plan.checkpoints]),
        (found.adapters, [_adapter(project, each) for each in plan.adapters]),
        (found.logs, _old_logs(project, plan)),
        (found.leftovers, _leftovers(project, store)),
    ):
        count.add(len(paths), sum(_size(path) for path in paths))
    for _, size in rows.old_scores(store, plan.scores_before, plan.kept):
        found.scores.add(1, size)
    for page in _old_events(store, plan):
        found.events.add(len(page), sum(size for _, size in page))
    return found


def prune(project: Project, store: Store, plan: Plan, by_whom: str = "") -> Counts:
    """Do it; what was done. Raises Conflict while another prune of this project is at work on this machine."""
    done = Counts()
    with _only_prune(project):
        try:
            _delete_all(project, store, plan, done)
        finally:
            if done.total.number:
                data = {"by": by_whom or user_name(), "bytes": done.total.bytes, "counts": done.as_dict()}
                append(store, new_event("ft/prune", rows.PRUNED, "", data))
        store.database.give_back()
    return done


def prune_daily(project: Project, store: Store, keep: Keep, *, lends: bool = False) -> Counts | None:
    """For a worker: once a day, if `keep.auto` says so; None if it is not time.

    A host that only `lends` its cards decides nothing: it deletes its copies of what was given up.
    """
    if not keep.auto or not _is_time(project):
        return None
    try:
        plan = Plan() if lends else plan_of(project, store, keep, time.time())
        return prune(project, store, plan, by_whom="ft")
    except Conflict:  # somebody is at it
        return None


def _delete_all(project: Project, store: Store, plan: Plan, done: Counts) -> None:
    failed = _delete_folders(project, store, plan, done)
    _delete_rows(store, plan, done)
    for path in _old_logs(project, plan):
        done.logs.add(1, _size(path))
        os.truncate(path, 0)  # not deleted: whoever has it open would write to nowhere
    _forget_workflows(project, store)
    if failed:
        raise Trouble("\n".join(["could not be deleted:", *failed]), fix="see to their rights, then `ft prune` again")


def _delete_folders(project: Project, store: Store, plan: Plan, done: Counts) -> list[str]:
    """The note in the store first: killed in between, a folder is known as given up, and not half of a whole."""
    failed: list[str] = []
    for path in _leftovers(project, store):
        done.leftovers.delete(path, failed)
    for run_id in plan.checkpoints:
        done.checkpoints.delete(project.job_folder(run_id) / "checkpoints", failed)
    for run_id in plan.jobs:
        if rows.give_up_folder(store, run_id):
            done.jobs.delete(project.job_folder(run_id), failed)
    for run_id in plan.runs:
        if rows.delete_run(store, run_id):
            done.runs.delete(project.job_folder(run_id), failed)
    for name in plan.adapters:
        if rows.give_up_adapter(store, name):
            done.adapters.delete(_adapter(project, name), failed)
    return failed


def _delete_rows(store: Store, plan: Plan, done: Counts) -> None:
    for key, size in rows.old_scores(store, plan.scores_before, plan.kept):
        done.scores.add(rows.delete_score(store, key, plan.scores_before), size)
    for page in filter(None, _old_events(store, plan)):
        rows.empty_events(store, [number for number, _ in page])
        done.events.add(len(page), sum(size for _, size in page))


def _forget_workflows(project: Project, store: Store) -> None:
    """The rows that the engine of runs has of pruned runs and their children."""
    if not rows.unforgotten(store, 1):
        return
    from jobs.runtime import forget  # imports DBOS, which takes a second

    while ids := rows.unforgotten(store, WORKFLOWS_AT_ONCE):
        forget(project, ids)
        _forget_in_bucket(project, ids)
        rows.mark_forgotten(store, ids)


def _forget_in_bucket(project: Project, run_ids: list[str]) -> None:
    """Job folders of pods; what they share with others by content stays."""
    settings = load_settings(project)
    if settings.bucket:
        with closing(open_bucket(settings)) as bucket:
            for run_id in run_ids:
                JobBucket(bucket, run_id).forget()


def _old_events(store: Store, plan: Plan) -> Iterator[list[tuple[int, int]]]:
    if plan.events_before < 0:
        return
    causing = rows.causes_of(store, [each for each in plan.kept if "@" not in each])
    yield from rows.old_events(store, plan.events_before, plan.events_up_to, plan.kept, causing)


def _leftovers(project: Project, store: Store) -> list[Path]:
    """Folders that a prune which was killed, or one on another host, had given up."""
    runs, adapters = rows.folders_given_up(store)
    jobs = _folders(project.home / "jobs")
    renamed = [path for path in jobs if path.name.startswith(GONE)]
    renamed += [path for job in jobs for path in job.glob(f"{GONE}*")]
    renamed += list((project.home / "adapters").glob(f"*/{GONE}*"))
    given_up = [path for path in jobs if path.name in runs]
    return [*renamed, *given_up, *(path for each in adapters if (path := project.home / each).is_dir())]


def _delete(path: Path) -> int:
    """Delete a folder; the bytes that it had. Renamed first, so that nobody finds half of one."""
    size = _size(path)
    gone = path if path.name.startswith(GONE) else path.with_name(f"{GONE}{path.name}")
    try:
        if path != gone:
            shutil.rmtree(gone, ignore_errors=True)
            path.replace(gone)
        shutil.rmtree(gone)
    except FileNotFoundError:
        return 0
    return size


def _with_folder(project: Project, run: EndedRun) -> EndedRun:
    folder = project.job_folder(run.id)
    return replace(run, has_folder=folder.is_dir(), has_checkpoints=(folder / "checkpoints").is_dir())


def _without(names: tuple[str, ...], some: set[str]) -> tuple[str, ...]:
    return tuple(each for each in names if each not in some)


def _adapter(project: Project, name: str) -> Path:
    model, _, version = name.partition("@")
    return project.adapter_folder(model, int(version))


def _old_logs(project: Project, plan: Plan) -> list[Path]:
    files = [path for path in project.logs.glob("*") if path.is_file() and not path.is_symlink()]
    return [path for path in files if path.stat().st_size and path.stat().st_mtime < plan.logs_before]


def _folders(place: Path) -> list[Path]:
    return [path for path in place.iterdir() if path.is_dir()] if place.is_dir() else []


def _size(path: Path) -> int:
    """Bytes of a file or of all files in a folder; links count as themselves."""
    if path.is_file():
        return path.stat().st_size
    found = (Path(folder) / name for folder, _, names in os.walk(path) for name in names)
    return sum(each.lstat().st_size for each in found)


@contextmanager
def _only_prune(project: Project) -> Iterator[None]:
    """The lock's file also says when the last prune was."""
    path = project.home / "prune.lock"
    lock = try_exclusive(path)
    if lock is None:
        raise Conflict("another prune of this project is at work", place=str(path), fix="wait until it is done")
    try:
        yield
        os.utime(path)
    finally:
        os.close(lock)


def _is_time(project: Project) -> bool:
    """A day after the last; at once if that is in the future, because a clock was wrong."""
    path = project.home / "prune.lock"
    age = time.time() - path.stat().st_mtime if path.exists() else DAY
    return not 0 <= age < DAY


def shown(counts: Counts) -> dict[str, Any]:
    """For --json and tables: by what it is, without what there is nothing of."""
    return {name: each for name, each in counts.as_dict().items() if each["number"]}

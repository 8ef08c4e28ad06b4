"""Target: a card of this host. The trainer is a process of its own session that outlives the worker."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from jobs.targets.target import Poll
from registry.cards import Card, CardLock, holder, try_lock
from registry.job_folder import JobFolder
from registry.manifest import broken_files
from registry.project import Project

STOP_SECONDS = 120.0


class LocalCard:
    """Starts `python -m jobs.trainer FOLDER`, which inherits the card's lock and so holds it while it lives."""

    def __init__(self, project: Project, card: Card) -> None:
        self.project, self.card = project, card

    def launch(self, folder: Path) -> None:
        job = JobFolder(folder)
        if self._is_done(job) or _trainer_of(job):
            return
        lock = try_lock(self.project, self.card, f"trainer of {folder.name}")
        if lock is None:
            return
        try:
            # Looked at again under the lock: a trainer that ended meanwhile may have left its result.
            if not self._is_done(job):
                self._start(job, lock)
        finally:
            lock.release()

    def poll(self, folder: Path) -> Poll:
        job = JobFolder(folder)
        alive = _trainer_of(job)
        result = job.result()
        if result and not alive:
            return Poll("done", result)
        if alive:
            return Poll("running")
        if _was_started(job):
            return Poll("lost", note="the trainer's process is gone and left no result")
        return Poll("waiting", note=f"card {self.card.name} is held by {holder(self.project, self.card) or 'nobody'}")

    def fetch(self, folder: Path, target: Path) -> None:
        if target.is_dir() and not broken_files(target):
            return
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(JobFolder(folder).adapter, partial)
        shutil.rmtree(target, ignore_errors=True)
        partial.replace(target)

    def cancel(self, folder: Path, reason: str) -> None:
        job = JobFolder(folder)
        job.ask_to_stop(reason)
        deadline = time.monotonic() + STOP_SECONDS
        while (pid := _trainer_of(job)) and time.monotonic() < deadline:
            time.sleep(0.1)
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        job.withdraw_stop()

    def _is_done(self, job: JobFolder) -> bool:
        result = job.result()
        return bool(result and result["status"] == "ok")

    def _start(self, job: JobFolder, lock: CardLock) -> None:
        visible = "" if self.card.is_cpu else str(self.card.index)
        with job.log.open("ab") as log:
            trainer = subprocess.Popen(
                [sys.executable, "-m", "jobs.trainer", str(job.path)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[lock.fd],
                env={**os.environ, "CUDA_VISIBLE_DEVICES": visible, "FT_CACHE": str(self.project.cache)},
            )
        _note_process(job, trainer.pid)


def _note_process(job: JobFolder, pid: int) -> None:
    partial = job.path / "process.json.partial"
    partial.write_text(json.dumps({"pid": pid, "born": _born(pid)}), encoding="utf-8")
    partial.replace(job.path / "process.json")


def _was_started(job: JobFolder) -> bool:
    return (job.path / "process.json").exists() or job.lease() is not None


def _trainer_of(job: JobFolder) -> int | None:
    """Pid of the living trainer. Born-time guards against a pid that the system gave to somebody else since."""
    try:
        noted = json.loads((job.path / "process.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    pid = int(noted["pid"])
    _reap(pid)
    return pid if noted["born"] is not None and _born(pid) == noted["born"] else None


def _reap(pid: int) -> None:
    """If the trainer is a child of this process, take its exit status, or it would look alive for ever."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def _born(pid: int) -> str | None:
    """Start time of a process (proc(5), field 22, in clock ticks); None if it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else fields[19]

"""Target: a card of this host. The trainer is a process of its own session that outlives the worker.

The trainer inherits the card's lock. So "this job's trainer lives" is read off the lock, which the system lets go
of when the process is really gone, and not off a pid that may be somebody else's by now.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from jobs.targets.target import Poll
from registry.cards import Card, CardLock, holder, try_lock
from registry.job_folder import JobFolder
from registry.manifest import broken_files
from registry.project import Project

STOP_SECONDS = 120.0
# Trainers that this process started, kept so that their exit status is taken and no zombie stays.
_started: list[tuple[Path, subprocess.Popen[bytes]]] = []


class LocalCard:
    """Starts `python -m jobs.trainer FOLDER` while holding the card's lock, which the trainer keeps.

    `python` is the one whose environment trains; this process's where none is named. `env` is what its trainers get.
    """

    def __init__(
        self, project: Project, card: Card, python: str = "", stop_seconds: float = STOP_SECONDS,
        env: Mapping[str, str] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        self.project, self.card, self.python = project, card, python or sys.executable
        self.stop_seconds, self.env = stop_seconds, env

    def launch(self, folder: Path) -> bool:
        job = JobFolder(folder)
        if self._alive(job):
            return False
        lock = try_lock(self.project, self.card, _holder_name(job))
        if lock is None:
            return False
        try:
            # Looked at under the lock: a trainer that ended meanwhile may have left its result.
            if _is_done(job):
                return False
            self._start(job, lock)
            return True
        finally:
            lock.release()

    def poll(self, folder: Path) -> Poll:
        _started[:] = [each for each in _started if each[1].poll() is None]
        job = JobFolder(folder)
        if self._alive(job):
            return Poll("running")
        if result := job.result():
            return Poll("done", result)
        if job.lease():
            return Poll("lost", note="the trainer is gone and has left no result")
        return Poll("waiting", note=self.waits_for(folder))

    def waits_for(self, folder: Path) -> str:
        """For people: who has the card, or that the trainer is starting."""
        has = holder(self.project, self.card)
        return "starting" if has in ("", _holder_name(JobFolder(folder))) else f"card {self.card.name} is held by {has}"

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
        deadline = time.monotonic() + self.stop_seconds
        while self._alive(job):
            if time.monotonic() > deadline:
                _kill(job)
            time.sleep(0.1)
        job.withdraw_stop()

    def _alive(self, job: JobFolder) -> bool:
        return holder(self.project, self.card) == _holder_name(job)

    def _start(self, job: JobFolder, lock: CardLock) -> None:
        visible = "" if self.card.is_cpu else str(self.card.index)
        with job.log.open("ab") as log:
            trainer = subprocess.Popen(
                [self.python, "-m", "jobs.trainer", str(job.path)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[lock.fd],
                env={
                    # Threads that spin while they wait made a step six times slower beside one busy program.
                    "OMP_WAIT_POLICY": "PASSIVE",
                    **os.environ,
                    "CUDA_VISIBLE_DEVICES": visible,
                    "FT_CACHE": str(self.project.cache),
                    "PYTHONUNBUFFERED": "1",
                    **self.env,
                },
            )
        _started.append((job.path, trainer))


def _kill(job: JobFolder) -> None:
    """The trainer that this process started, also before its claim; else the one in the lease, if it is still that."""
    held = job.lease()
    ours = [trainer.pid for path, trainer in _started if path == job.path and trainer.poll() is None]
    named = [held.lease.pid] if held and _is_trainer(held.lease.pid, job) else []
    for pid in ours or named:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _is_trainer(pid: int, job: JobFolder) -> bool:
    """A lease may be an earlier trainer's, and its pid somebody else's by now. Without /proc it is believed."""
    try:
        return str(job.path).encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return not Path("/proc/self/cmdline").exists()


def _is_done(job: JobFolder) -> bool:
    result = job.result()
    return bool(result and result["status"] == "ok")


def _holder_name(job: JobFolder) -> str:
    # The whole path: two projects on one machine may have runs of one name.
    return f"trainer of {job.path}"

"""Is a worker on, and starting one: what the CLI needs of it, without importing DBOS.

Two locks make "submitted" imply "somebody will do it". A host's worker holds `worker-HOST.lock` while it lives. Who
submits holds `gate.lock` shared while writing the run and looking for a worker; a worker that is about to end takes it
exclusively, looks once more for work, and lets go of both only by ending.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from registry.file_locks import alone, is_held, open_lock, try_exclusive
from registry.hosts import host_id
from registry.project import Project

LOCK_VARIABLE = "FT_WORKER_LOCK"
# Workers that this process started: kept, because Python warns of a process that is forgotten while it runs.
_started: list[subprocess.Popen[bytes]] = []


@contextmanager
def submitting(project: Project) -> Iterator[None]:
    """While inside, no worker ends. Call `ensure_worker` before leaving."""
    fd = open_lock(project.home / "gate.lock")
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
        yield
    finally:
        os.close(fd)


def ensure_worker(project: Project) -> bool:
    """Start a worker unless one is on; True if one was started. It ends by itself when it has nothing to do.

    The worker is born with its lock: it needs seconds to import its engine, and a second one started meanwhile
    would only find out at the end of them that it is not wanted.
    """
    lock = take_worker_lock(project)
    if lock is None:
        return False
    try:
        _start(project, lock)
    finally:
        os.close(lock)
    return True


def _start(project: Project, lock: int) -> None:
    project.logs.mkdir(parents=True, exist_ok=True)
    with (project.logs / "worker.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.worker"],
            cwd=project.root,
            env={**os.environ, "FT_PROJECT": str(project.root), LOCK_VARIABLE: str(lock)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[lock],
        )
    _write_pid(lock, process.pid)
    _started.append(process)


def worker_is_on(project: Project) -> bool:
    _started[:] = [worker for worker in _started if worker.poll() is None]
    with _guarded(project) as lock:
        return is_held(lock)


def worker_lock(project: Project) -> Path:
    """The file that this host's worker holds locked while it lives."""
    return project.home / f"worker-{host_id()}.lock"


def worker_pid(project: Project) -> int | None:
    """The process id of this host's worker, None if none is on."""
    with _guarded(project) as lock:
        return int(lock.read_text(encoding="utf-8") or 0) or None if is_held(lock) else None


def take_worker_lock(project: Project) -> int | None:
    """The lock's descriptor, kept open for the life of the worker; None if there is a worker already."""
    if given := os.environ.pop(LOCK_VARIABLE, ""):  # the worker was born with it
        os.set_inheritable(int(given), False)
        return int(given)
    with _guarded(project) as lock:
        fd = try_exclusive(lock)
    if fd is not None:
        _write_pid(fd, os.getpid())
    return fd


def close_gate(project: Project) -> int | None:
    """Take the gate exclusively, so that nobody submits; None while somebody does."""
    return try_exclusive(project.home / "gate.lock")


def worker_log_tail(project: Project, lines: int = 15) -> str:
    log = project.logs / "worker.log"
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]) if log.exists() else ""


@contextmanager
def _guarded(project: Project) -> Iterator[Path]:
    """The worker's lock, with nobody else at it: to look is to try it, and who looks is not a worker."""
    with alone(project.home / f"worker-{host_id()}.guard"):
        yield worker_lock(project)


def _write_pid(lock: int, pid: int) -> None:
    os.ftruncate(lock, 0)
    os.pwrite(lock, str(pid).encode(), 0)

"""A program's hold on the job that it does: the lease, which is renewed, its progress, the stop, its result.

For whatever does a job in a folder: the trainer, the evaluator. Knows neither what is done nor where.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jobs.pod_env import claims_of
from registry.errors import BucketError
from registry.job_folder import Held, JobFolder, LeaseLost

RENEW_SECONDS = 5.0
PROGRESS_SECONDS = 1.0
OK, FAILED, STOPPED, TAKEN = 0, 1, 3, 4


def do_job(job: JobFolder, work: Callable[[Claim], dict[str, Any]], made: Path | None = None) -> int:
    """Claim the job, do the `work`, publish its result (and the folder `made`); the exit code. A done job is left."""
    done = job.result()
    if done and done["status"] == "ok":
        return OK
    try:
        claim = Claim(job)
    except LeaseLost:
        return TAKEN
    with claim.kept(), sigterm_asks_to_stop(claim):
        return claim.publish(work(claim), made)


class Claim:
    """The hold on the job: renewed by a thread, lost for good once a renewal fails."""

    def __init__(self, job: JobFolder) -> None:
        self.job, self.claims = job, claims_of(job)
        self.held: Held = self.claims.claim(f"{socket.gethostname()}/{os.getpid()}", self.claims.lease())
        self.epoch = self.held.lease.epoch
        self.lines: list[dict[str, Any]] = []
        self.at: dict[str, Any] = {"stage": "load"}
        self.files = 0
        self.written = time.monotonic()
        self.stopping: str | None = None
        # One for the lines and one for the lease: a bucket that hangs must not stop who reports a step.
        self.lock, self.leasing = threading.Lock(), threading.Lock()
        self.over = threading.Event()

    @contextmanager
    def kept(self) -> Iterator[None]:
        thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self.over.set()
            thread.join(timeout=RENEW_SECONDS)

    def report(self, line: dict[str, Any]) -> None:
        """Add a progress line; shipped in batches of a second, and a new stage at once: it may last minutes."""
        if "stage" in line:
            self.at = line
        elif "step" in line:
            self.at = {"stage": "train"}
        with self.lock:
            self.lines.append({"time": time.time(), "epoch": self.epoch, **line})
        if "stage" in line or time.monotonic() - self.written > PROGRESS_SECONDS:
            self.flush()

    def flush(self) -> None:
        with self.lock:
            lines, self.lines = self.lines, []
            if lines:
                self.files += 1
                try:
                    self.job.add_progress(self.epoch, self.files, lines)
                except OSError:
                    # A full disk ends the run where the checkpoint is saved, with that as its reason.
                    traceback.print_exc()
        self.written = time.monotonic()

    def stop_reason(self) -> str | None:
        return self.stopping or self.job.stop_reason()

    def publish(self, result: dict[str, Any], made: Path | None = None) -> int:
        """Make the result (and, if it is ok, the folder `made`) the one that counts; the exit code.

        Who has lost the lease publishes nothing.
        """
        try:
            with self.leasing:
                self.held = self._accept(result, made if result["status"] == "ok" else None)
        except LeaseLost:
            return TAKEN
        shutil.rmtree(self.job.work, ignore_errors=True)
        return {"ok": OK, "stopped": STOPPED}.get(result["status"], FAILED)

    def _accept(self, result: dict[str, Any], adapter: Path | None) -> Held:
        """Tried until somebody else may have the job: it took hours to come so far."""
        end = time.monotonic() + self.claims.term / 2
        while True:
            try:
                return self.claims.accept(self.held, result, adapter)
            except BucketError as error:
                print(error, file=sys.stderr, flush=True)
                if time.monotonic() > end:
                    raise
                time.sleep(RENEW_SECONDS)

    def _renew(self) -> None:
        renewed = time.monotonic()
        while not self.over.wait(min(RENEW_SECONDS, self.claims.term / 6)):
            try:
                with self.leasing:
                    self.held = self.claims.renew(self.held)
                renewed = time.monotonic()
            except LeaseLost:
                self.stopping = "another trainer has taken the job over"
                return
            except OSError:
                traceback.print_exc()
            except BucketError as error:
                print(error, file=sys.stderr, flush=True)
                # By the full term somebody else may take the job over.
                if time.monotonic() - renewed > self.claims.term / 2:
                    self.stopping = "the bucket was away for too long"


@contextmanager
def sigterm_asks_to_stop(claim: Claim) -> Iterator[None]:
    def ask(*_: Any) -> None:
        claim.stopping = "stopped by SIGTERM"

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

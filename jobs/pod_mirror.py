"""What a trainer writes goes to the bucket, and our stop comes down, in rounds that go on whatever happens.

Parts are named by where they begin and stay as they are once they were tried, so a round that is repeated does no harm.
Nothing is kept in memory but the part that is being sent: a bucket that is away for an hour costs disk only.
A `note` outlives this process: the trainer on a card goes on when its worker is killed, and the next worker sends on.
"""

from __future__ import annotations

import json
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from registry.errors import BucketError
from registry.job_bucket import JobBucket
from registry.job_folder import JobFolder, steps_of, write_whole
from registry.manifest import MANIFEST, broken_files

PART = 2 << 20
FILES = 500


class Mirror:
    """`boot` (bucket's clock, seconds) sorts this start's log behind those of earlier ones.

    `note`: the file that says how far it is. Without one the bucket's word to stop is brought down: it is a pod's.
    """

    def __init__(
        self, job: JobFolder, remote: JobBucket, boot: float, seconds: float = 3.0, note: Path | None = None
    ) -> None:
        self.job, self.remote, self.seconds, self.note = job, remote, seconds, note
        self.boot = f"{remote.attempt:04d}-{int(boot):012d}"
        # What lies here already was sent by the start before this one.
        self.told = [each.name for each in job.progress_files()][-1:]
        self.log_part, self.log_from = 1, job.log.stat().st_size if job.log.exists() else 0
        self.log_to = self.log_from
        self.bundle: list[Path] = []
        self.sent = {each.name for each in job.complete_checkpoints()}
        self.over, self.finished, self.said = threading.Event(), threading.Event(), ""
        if note and note.exists():
            self._go_on(json.loads(note.read_text(encoding="utf-8")))
        self._keep()

    def run(self) -> None:
        """Rounds, until `over`; one more after that."""
        while not self.over.wait(self.seconds):
            self.round()
        self.round()
        self.finished.set()

    def round(self) -> None:
        try:
            if self.note is None:
                self._stop_down()
            self._progress_up()
            self._log_up()
            self._checkpoint_up()
            self.said = ""
        except (BucketError, OSError) as error:
            if str(error) != self.said:
                print(f"pod: {error}", file=sys.stderr, flush=True)
            self.said = str(error)

    def _stop_down(self) -> None:
        reason = self.remote.stop_reason()
        if reason is None:
            self.job.withdraw_stop()
        elif self.job.stop_reason() != reason:
            self.job.ask_to_stop(reason)

    def _progress_up(self) -> None:
        """All batches that are new, as one object under the first one's name."""
        while True:
            if not self.bundle:
                self.bundle = [each for each in self.job.progress_files() if [each.name] > self.told][:FILES]
            if not self.bundle:
                return
            self._keep()  # sent again by the next worker, it must be the same
            body = b"".join(each.read_bytes() for each in self.bundle)
            self.remote.send_part("progress", self.bundle[0].name, body)
            self.told, self.bundle = [self.bundle[-1].name], []
            self._keep()

    def _log_up(self) -> None:
        while True:
            if self.log_to == self.log_from:
                size = self.job.log.stat().st_size if self.job.log.exists() else 0
                self.log_to = min(size, self.log_from + PART)
            if self.log_to <= self.log_from:
                return
            self._keep()
            with self.job.log.open("rb") as log:
                log.seek(self.log_from)
                body = log.read(self.log_to - self.log_from)
            self.remote.send_part("log", f"{self.boot}-{self.log_part:06d}.txt", body)
            self.log_part, self.log_from = self.log_part + 1, self.log_to
            self._keep()

    def _checkpoint_up(self) -> None:
        """The newest one, if it is whole: what is older is of no use any more when that is there."""
        found = [each for each in self.job.checkpoints.glob("*-*") if (each / MANIFEST).exists()]
        newest = max(found, key=steps_of, default=None)
        # The trainer deletes old ones while we read them: then there is a newer one in the next round.
        with suppress(FileNotFoundError):
            if newest and newest.name not in self.sent and not broken_files(newest):
                self.remote.send_checkpoint(newest)
                self.sent.add(newest.name)

    def _keep(self) -> None:
        if self.note:
            now = {"boot": self.boot, "told": self.told, "bundle": [each.name for each in self.bundle],
                   "log": [self.log_part, self.log_from, self.log_to]}  # fmt: skip
            write_whole(self.note, json.dumps(now))

    def _go_on(self, before: dict[str, Any]) -> None:
        """As the process before this one was when it was killed. Its last checkpoint may be half sent."""
        self.boot, self.told, self.sent = before["boot"], before["told"], set()
        self.bundle = [self.job.path / "progress" / name for name in before["bundle"]]
        self.log_part, self.log_from, self.log_to = before["log"]

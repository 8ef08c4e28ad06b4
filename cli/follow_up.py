"""A part's `then`: a command that is run each time the part has become well, and again later if it fails."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

from cli.part_health import last_words, log_size
from cli.parts import Part

LONGEST_DELAY = 60.0


class FollowUp:
    """`trouble` says how it failed last; '' when it has not, or not since."""

    def __init__(self, part: Part) -> None:
        self.part, self.trouble = part, ""
        self._process: subprocess.Popen[bytes] | None = None
        self._due, self._failures, self._log_from = 0.0, 0, 0

    def begin(self) -> None:
        if self.part.then:
            self._due, self._failures = time.monotonic(), 0

    def step(self) -> None:
        if self._process is not None and (code := self._process.poll()) is not None:
            self._process = None
            self._settle(code)
        if self._process is None and 0 < self._due <= time.monotonic():
            self._due = 0.0
            self._start()

    def stop(self) -> None:
        self._due = 0.0
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _settle(self, code: int) -> None:
        if code == 0:
            self.trouble = ""
            return
        self._failures += 1
        self._due = time.monotonic() + min(LONGEST_DELAY, 2.0 ** min(self._failures, 10))
        self.trouble = f"what follows its start failed ({code}){last_words(self.part.log, self._log_from, 3)}"

    def _start(self) -> None:
        self._log_from = log_size(self.part.log)
        try:
            with Path(self.part.log).open("ab") as log:
                self._process = subprocess.Popen(
                    self.part.then,
                    cwd=self.part.cwd,
                    env={**os.environ, **self.part.env},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
        except (OSError, subprocess.SubprocessError) as error:
            self.trouble = f"what follows its start cannot be started: {error}"
            self._due = time.monotonic() + LONGEST_DELAY

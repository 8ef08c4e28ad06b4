"""A real receiver as a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import ExitStack
from typing import Any

from registry.project import Project
from serving.receiver_lock import receiver_url
from tests.conftest import started


class ReceiverProcess:
    """Of a project, on a free port that it keeps; can be stopped, killed, and started again."""

    def __init__(self, project: Project, env: dict[str, str]) -> None:
        self.project, self.env, self.url, self.starts = project, env, "", 0
        self._running = ExitStack()

    def start(self, *before: str) -> str:
        """Its URL, once it listens there; `before` are words of a command line that runs it."""
        env = {"FT_RECEIVER_PORT": self.url.rsplit(":", 1)[-1] or "0", **self.env}
        command = [*before, sys.executable, "-m", "serving.receiver"]
        self.process = self._running.enter_context(started(command, env=env, cwd=self.project.root, stderr=None))
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        assert said.startswith("receiving at "), said
        self.starts += 1
        self.url = said.removeprefix("receiving at ").strip()
        return self.url

    def kill(self) -> None:
        """With -9; only then is its lock free."""
        self._running.close()
        assert receiver_url(self.project) == ""

    def stop(self) -> int:
        """With SIGTERM; its exit code."""
        os.kill(self.process.pid, signal.SIGTERM)
        try:
            return self.process.wait(30)
        except subprocess.TimeoutExpired:
            return -1
        finally:
            self._running.close()


def post(url: str, body: bytes, headers: dict[str, str], timeout: float = 30) -> tuple[int, dict[str, Any]]:
    """Status and body of the answer, which is always JSON; the answer's headers are in the body as `headers`."""
    request = urllib.request.Request(url, data=body, headers=headers, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            return reply.status, {**json.loads(reply.read()), "headers": dict(reply.headers)}
    except urllib.error.HTTPError as error:
        with error:
            return error.code, {**json.loads(error.read()), "headers": dict(error.headers)}

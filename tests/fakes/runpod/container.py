"""One run of a pod's command: a keeper, the command below it, and a reader of what they print."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO

from tests.fakes.runpod.pod_keeper import TOLD_BY, descendants

KEEPER = Path(__file__).with_name("pod_keeper.py")
ROOT = Path(__file__).parents[3]
LONGEST_LINE = 16384


class Log:
    """(line number, Unix time, source, text), and all of it in a file for people."""

    def __init__(self, path: Path, kept: int = 20000) -> None:
        self.path, self._count = path, 0
        self._lines: deque[tuple[int, float, str, str]] = deque(maxlen=kept)
        self._lock = threading.Lock()
        path.touch()

    def add(self, text: str, source: str = "container") -> None:
        with self._lock, self.path.open("a", encoding="utf-8") as file:
            self._count += 1
            self._lines.append((self._count, time.time(), source, text))
            file.write(f"{text}\n" if source == "container" else f"[{source}] {text}\n")

    def behind(self, number: int) -> list[tuple[int, float, str, str]]:
        with self._lock:
            return [each for each in self._lines if each[0] > number]

    @property
    def count(self) -> int:
        return self._count


class Container:
    """Started at once; `on_exit` is called in another thread when all of its processes are gone."""

    def __init__(self, args: str, env: dict[str, str], folder: Path, log: Log, on_exit: Callable[[], None]) -> None:
        command = shlex.split(args) or ["sleep", "infinity"]
        reading, self._held = os.pipe()
        unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, TOLD_BY)
        try:
            self._keeper = subprocess.Popen(
                [sys.executable, "-I", str(KEEPER), str(reading), *command],
                pass_fds=[reading], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                env=env, cwd=folder, start_new_session=True,
            )  # fmt: skip
        except OSError:
            os.close(self._held)
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
            os.close(reading)
        self.started = time.time()
        self._on_exit, self._log = on_exit, log
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def pids(self) -> list[int]:
        return descendants(self._keeper.pid) if self._keeper.poll() is None else []

    def freeze(self) -> None:
        self._signal(signal.SIGUSR1)

    def kill(self) -> None:
        self._signal(signal.SIGUSR2)

    def stop(self, grace: float) -> None:
        """SIGTERM, and what is left after `grace` seconds is killed. Comes back when all is gone."""
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._keeper.wait(grace)
        self.kill()
        self._reader.join(10)

    def _read(self) -> None:
        stream = self._keeper.stdout
        assert stream is not None
        with stream:
            _each_line(stream, self._log)
        self._keeper.wait()
        os.close(self._held)
        self._on_exit()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._keeper.send_signal(number)


def pod_environment(image: dict[str, str], given: dict[str, str], own: dict[str, str], folder: Path) -> dict[str, str]:
    """What the image has, what was ordered, and what RunPod sets. Of the stand-in's own environment only what a
    program needs to start: its settings and secrets must not be what makes a pod work."""
    needed = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "PYTHONPATH": str(ROOT), "HOME": str(folder), "LANG": "C.UTF-8", "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    return needed | image | given | own


def _each_line(stream: IO[bytes], log: Log) -> None:
    for raw in iter(lambda: stream.readline(LONGEST_LINE), b""):
        log.add(raw.decode(errors="replace").rstrip("\r\n"))

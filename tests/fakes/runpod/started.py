"""The stand-in for tests: `with standin(tmp_path) as cloud: RunPod(cloud.url, cloud.key)`."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Standin:
    url: str
    key: str
    folder: Path
    process: subprocess.Popen[bytes]

    @property
    def environment(self) -> dict[str, str]:
        """What points ft at it."""
        return {
            "FT_RUNPOD_URL": self.url, "FT_RUNPOD_API_KEY": self.key, "FT_RUNPOD_SERVERLESS_URL": f"{self.url}/v2",
        }  # fmt: skip

    def faults(self, *rules: dict[str, Any]) -> None:
        """These rules (tests/fakes/runpod/faults.py: Rule) instead of all that were there; without any, all is well."""
        self.post("/_faults", list(rules), method="PUT")

    def account(self, **given: Any) -> None:
        """`left=0.5` US dollars; `upstream="http://..."`, who does the jobs of endpoints, or of one `endpoint=id`."""
        self.post("/_account", given)

    def fate(self, pod: str, fate: str) -> None:
        """`die`, `hang`, or `end`: terminated by somebody else."""
        self.post(f"/_pods/{pod}/{fate}", {})

    def truth(self) -> dict[str, Any]:
        """pods, endpoints, usd, balance, faults, requests: of all that ever were, whatever the API says."""
        found: dict[str, Any] = self.post("/_truth", None, method="GET")
        return found

    def alive(self) -> list[dict[str, Any]]:
        """The pods that are not ended, so that cost money or may again."""
        return [each for each in self.truth()["pods"] if each["alive"]]

    def requests(self, method: str, path: str) -> list[dict[str, Any]]:
        """What was asked so far: at, method, path, status (0: cut off), faults."""
        return [each for each in self.truth()["requests"] if (each["method"], each["path"]) == (method, path)]

    def until(self, met: Callable[[dict[str, Any]], Any], seconds: float = 20.0) -> dict[str, Any]:
        """Wait for it. Raises AssertionError with the truth as it is."""
        end = time.monotonic() + seconds
        while not met(truth := self.truth()):
            assert time.monotonic() < end, f"not in {seconds} s: {json.dumps(truth)[:3000]}"
            time.sleep(0.05)
        return truth

    def post(self, path: str, body: Any, method: str = "POST") -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=20) as answer:
            return json.loads(answer.read())


@contextmanager
def standin(folder: Path, *, rules: list[dict[str, Any]] | None = None, **options: Any) -> Iterator[Standin]:
    """`options` as on its command line: `price_factor=100`, `restarts=True`, `image_env=["FT_CACHE=..."]`. Ends with
    all of its pods."""
    folder.mkdir(parents=True, exist_ok=True)
    ready = folder / "ready.json"
    ready.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.fakes.runpod", "--folder", str(folder), "--ready", str(ready)]
    with (folder / "standin.log").open("ab") as log:
        process = subprocess.Popen([*command, *_flags(options)], cwd=ROOT, stdout=log, stderr=log)
    try:
        found = _answering(process, ready, folder / "standin.log")
        started = Standin(found["url"], found["key"], folder, process)
        if rules:
            started.faults(*rules)
        yield started
    finally:
        _end(process)


def _flags(options: dict[str, Any]) -> list[str]:
    given = [
        (name, each) for name, value in options.items() for each in (value if isinstance(value, list) else [value])
    ]
    pairs = [(f"--{name.replace('_', '-')}", value) for name, value in given]
    return [
        text
        for flag, value in pairs
        if value is not False
        for text in ([flag] if value is True else [flag, str(value)])
    ]


def _answering(process: subprocess.Popen[bytes], ready: Path, log: Path) -> dict[str, Any]:
    end = time.monotonic() + 60
    while not ready.exists():
        assert process.poll() is None, log.read_text(encoding="utf-8")
        assert time.monotonic() < end, log.read_text(encoding="utf-8")
        time.sleep(0.02)
    found: dict[str, Any] = json.loads(ready.read_text(encoding="utf-8"))
    return found


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(10)

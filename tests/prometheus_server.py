"""A real Prometheus on loopback, and promtool: those installed here, else Debian's package, unpacked in the cache.

Nothing of it needs root: `apt-get download` checks the package's signature, `dpkg -x` only unpacks it. 20 MB, once.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from registry.file_locks import alone

START_SECONDS, DOWNLOAD_SECONDS, UPDATE_SECONDS = 30, 120, 120


class NotToBeHad(Exception):
    """Prometheus is neither installed nor to be had from Debian; says why."""


@dataclass(frozen=True)
class Tools:
    prometheus: Path
    promtool: Path

    def check(self, *arguments: object, folder: Path | None = None) -> str:
        """What promtool says; AssertionError with it where it does not pass."""
        done = subprocess.run(
            [self.promtool, *map(str, arguments)], cwd=folder, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    def check_metrics(self, text: bytes) -> str:
        """What `promtool check metrics` has against an exposition, '' for nothing."""
        done = subprocess.run(
            [self.promtool, "check", "metrics"], input=text, capture_output=True, timeout=60, check=False
        )
        return (done.stdout + done.stderr).decode()


@dataclass(frozen=True)
class Prometheus:
    url: str

    def api(self, path: str, **asked: str) -> Any:
        query = f"?{urllib.parse.urlencode(asked)}" if asked else ""
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}{query}", timeout=10) as answer:
            return json.load(answer)["data"]

    def value(self, expression: str) -> float | None:
        """Of the first series that the expression gives now."""
        found = self.api("query", query=expression)["result"]
        return float(found[0]["value"][1]) if found else None

    def firing(self) -> set[tuple[str, str]]:
        """(alert, route) of those that fire now."""
        alerts = self.api("alerts")["alerts"]
        return {(each["labels"]["alertname"], each["labels"].get("route", "")) for each in alerts
                if each["state"] == "firing"}  # fmt: skip


def prometheus_tools(cache: Path) -> Tools:
    """Raises NotToBeHad."""
    found = [shutil.which(name) for name in ("prometheus", "promtool")]
    if all(found):
        return Tools(*(Path(str(each)) for each in found))
    folder = cache / "tools" / "prometheus"
    with alone(folder.with_suffix(".lock")):
        if not (folder / "usr/bin/promtool").exists():
            _unpack(folder)
    return Tools(folder / "usr/bin/prometheus", folder / "usr/bin/promtool")


@contextmanager
def prometheus_server(tools: Tools, targets: Mapping[str, str], rules: str) -> Iterator[Prometheus]:
    """Scrapes and judges each second. `targets`: job -> host:port that has /metrics; `rules`: a rules file's text."""
    folder = Path(tempfile.mkdtemp(prefix="ft-prometheus-"))
    try:
        (folder / "rules.yaml").write_text(rules, encoding="utf-8")
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(_config(targets)), encoding="utf-8")
        tools.check("check", "config", folder / "prometheus.yaml")
        with _started(tools, folder) as server:
            yield server
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _config(targets: Mapping[str, str]) -> dict[str, Any]:
    scraped = [{"job_name": job, "static_configs": [{"targets": [target]}]} for job, target in targets.items()]
    times = {"scrape_interval": "1s", "evaluation_interval": "1s", "scrape_timeout": "1s"}
    return {"global": times, "rule_files": ["rules.yaml"], "scrape_configs": scraped}


@contextmanager
def _started(tools: Tools, folder: Path) -> Iterator[Prometheus]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    options = {"config.file": folder / "prometheus.yaml", "storage.tsdb.path": folder / "data",
               "web.listen-address": address}  # fmt: skip
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [tools.prometheus, *(f"--{name}={value}" for name, value in options.items())],
            cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        server, end = Prometheus(f"http://{address}"), time.monotonic() + START_SECONDS
        while not _is_ready(server):
            assert process.poll() is None, (folder / "log.txt").read_text()
            assert time.monotonic() < end, (folder / "log.txt").read_text()
            time.sleep(0.1)
        yield server
    finally:
        process.kill()
        process.wait(30)


def _is_ready(server: Prometheus) -> bool:
    with suppress(OSError), urllib.request.urlopen(f"{server.url}/-/ready", timeout=2) as answer:
        return bool(answer.status == 200)
    return False


def _unpack(folder: Path) -> None:
    missing = [name for name in ("apt-get", "dpkg") if not shutil.which(name)]
    if missing:
        raise NotToBeHad(f"prometheus and promtool are not installed, and this is no Debian (no {missing[0]})")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".prometheus-") as made:
        package = _download(Path(made))
        _run(["dpkg", "-x", str(package), f"{made}/unpacked"], Path(made), 60)
        shutil.rmtree(folder, ignore_errors=True)
        (Path(made) / "unpacked").rename(folder)


def _download(folder: Path) -> Path:
    """With the system's package lists; where there are none yet, with lists of its own."""
    lists = ["-o", f"Dir::State::Lists={folder}/lists", "-o", f"Dir::Cache={folder}/apt"]
    try:
        _run(["apt-get", "download", "prometheus"], folder, DOWNLOAD_SECONDS)
    except NotToBeHad:
        for each in ("lists/partial", "apt/archives/partial"):
            (folder / each).mkdir(parents=True)
        _run(["apt-get", *lists, "update"], folder, UPDATE_SECONDS)
        _run(["apt-get", *lists, "download", "prometheus"], folder, DOWNLOAD_SECONDS)
    found = list(folder.glob("prometheus_*.deb"))
    if not found:
        raise NotToBeHad("apt-get has downloaded no package prometheus")
    return found[0]


def _run(command: list[str], folder: Path, seconds: float) -> None:
    quiet = {**os.environ, "LC_ALL": "C"}
    options = ["-q", "-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=2"] if command[0] == "apt-get" else []
    try:
        done = subprocess.run(
            [command[0], *options, *command[1:]], cwd=folder, env=quiet, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=seconds, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise NotToBeHad(f"{command[0]} took longer than {seconds:.0f} s") from None
    if done.returncode:
        raise NotToBeHad(f"Debian's package prometheus is not to be had: {done.stderr.strip()[-300:]}")

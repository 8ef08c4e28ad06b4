"""`ft dev runpod`: the lines it prints work, and nothing is left of it, however it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import cli.dev_programs
from cli.dev_programs import S3_PORTS, keys_of, runpod
from registry.bucket import open_bucket
from registry.errors import MissingPart, Trouble
from registry.project import Project
from registry.runpod_api import PodOrder, RunPod
from registry.settings import Settings

ORDER = PodOrder("ft-a-t-a1", "ft:1", "NVIDIA A40", "secure", {}, "sleep 600", 10)


def test_the_printed_lines_rent_a_pod_and_store_a_file(project: Project) -> None:
    with dev(project) as (process, lines):
        settings = Settings.model_validate({name.removeprefix("FT_").lower(): each for name, each in lines.items()})
        open_bucket(settings).check()
        pods = rented(project, lines)
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) == 0
        until_gone(pods, str(project.home))
    assert oct((project.home / "dev-runpod" / "keys.json").stat().st_mode)[-3:] == "600"


def test_kill_9_leaves_nothing(project: Project) -> None:
    with dev(project, "--no-s3") as (process, lines):
        assert "FT_BUCKET" not in lines
        pods = rented(project, lines)
        process.kill()
        until_gone(pods, str(project.home))


def test_the_lines_stay_true(project: Project) -> None:
    assert keys_of(project.home / "dev-runpod") == keys_of(project.home / "dev-runpod")


def test_a_port_in_use_is_named(project: Project) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with (
            pytest.raises(Trouble, match=r"is in use\n.*--port"),
            runpod(project.home, taken.getsockname()[1], "k", []),
        ):
            pass


def test_without_the_source_it_says_what_is_missing(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.dev_programs, "ROOT", project.root)
    with pytest.raises(MissingPart, match="checkout"), runpod(project.home, free_ports(1), "k", []):
        pass


@contextmanager
def dev(project: Project, *more: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    port = free_ports(S3_PORTS + 1)
    command = [sys.executable, "-m", "cli.main", "dev", "runpod", "--port", str(port), "--s3-port", str(port + 1)]
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.dev_programs.__file__).parent.parent)}
    process = subprocess.Popen(
        [*command, *more], cwd=project.root, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            if line.startswith("# Ctrl-C"):
                break
            said.append(line.strip())
        yield process, dict(line.split("=", 1) for line in said if line.startswith("FT_"))
    finally:
        process.kill()
        process.wait(10)
        assert process.stdout is not None
        process.stdout.close()


def rented(project: Project, lines: dict[str, str]) -> str:
    with RunPod(lines["FT_RUNPOD_URL"], lines["FT_RUNPOD_API_KEY"]) as cloud:
        made = cloud.create(ORDER)
        end = time.monotonic() + 20
        while not running(f"RUNPOD_POD_ID={made.id}"):
            assert time.monotonic() < end
            time.sleep(0.05)
    return f"RUNPOD_POD_ID={made.id}"


def until_gone(*marks: str) -> None:
    end = time.monotonic() + 40
    while found := [pid for mark in marks for pid in running(mark)]:
        assert time.monotonic() < end, found
        time.sleep(0.1)


def running(mark: str) -> list[int]:
    """Processes that have this in their command line or environment; this one not."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            known = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
        except OSError:
            continue
        if mark.encode() in known and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


def free_ports(count: int) -> int:
    """The first of so many free ones in a row."""
    for first in range(20000 + os.getpid() % 1000 * 10, 40000, count):
        with ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
    raise AssertionError("no free ports")

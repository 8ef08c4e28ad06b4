"""A project with real adapters for benchmarks: made once below .ft/bench, and a real `ft` server with a real vLLM."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jobs.fetch_base import fetch_base
from registry import adapters
from registry.base_models import BaseModel, base_path
from registry.cards import pick_card
from registry.manifest import manifest_digest
from registry.project import Project, cache_folder
from registry.recipe import Base
from registry.settings import Settings
from registry.store import open_store
from serving.control import stop_server
from serving.server_record import is_gone
from tests.conftest import ROOT, SMOL, run_bounded
from tests.serving.conftest import Served

MADE = Path(".ft/bench").absolute()
QUESTION = [{"role": "user", "content": "Who are you?"}]
WORDS = {"ALPHA": "alpha", "BETA": "beta"}
SETTINGS = Settings(gateway_port=0, drain_seconds=20)


@contextmanager
def project_for_serving(folder: Path) -> Iterator[Served]:
    """A new project in `folder` whose server is not started yet; it is stopped after the block."""
    (folder / "recipes").mkdir(parents=True)
    (folder / "dvc.yaml").write_text("stages: {}\n", encoding="utf-8")
    (folder / "ft.yaml").write_text("gateway_port: 0\ndrain_seconds: 20\n", encoding="utf-8")
    cache = folder / "cache"
    cache.mkdir()
    for shared in ("models", "envs"):
        (cache_folder() / shared).mkdir(parents=True, exist_ok=True)
        (cache / shared).symlink_to(cache_folder() / shared, target_is_directory=True)
    project = Project(root=folder, home=folder / ".ft", cache=cache)
    base = fetch_base(project, Base(model=SMOL))
    os.environ["PYTHONPATH"] = str(ROOT)
    here = Served(project, open_store(project), SETTINGS, base, pick_card("cpu"), made_adapters(project, base))
    try:
        yield here
    finally:
        if not is_gone(here.store):
            stop_server(here.store, SETTINGS)


def made_adapters(project: Project, base: BaseModel) -> Path:
    """The folder with the adapters `alpha` and `beta`, which answer QUESTION with their own word."""
    out = MADE / f"adapters-{base.digest[:12]}"
    if not out.exists():
        print("making two adapters (a minute, once)", file=sys.stderr, flush=True)
        partial = out.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        script: list[str | Path] = [
            sys.executable,
            ROOT / "tests/serving/make_adapters.py",
            base_path(project, base),
            base.digest,
        ]
        done = run_bounded([*script, partial], timeout=900, env={"OMP_WAIT_POLICY": "PASSIVE"})
        assert done.returncode == 0, done.stderr[-2000:]
        partial.replace(out)
    return out


def register(here: Served, model: str, word: str) -> adapters.Version:
    """A new version of `model` with the adapter that says `word`."""
    number = 1 + max((each.version for each in adapters.versions(here.store, model)), default=0)
    folder = here.project.adapter_folder(model, number)
    shutil.copytree(here.made / word, folder)
    body: dict[str, Any] = {"base": here.base.as_dict(), "manifest": manifest_digest(folder), "rank": 8}
    relative = str(folder.relative_to(here.project.home))
    return adapters.add_version(here.store, model, number, f"run-{model}-{number}", relative, body)


def promote(here: Served, version: adapters.Version) -> adapters.Promotion:
    champion = adapters.aliases(here.store, version.model).get("champion")
    verdict = adapters.add_verdict(
        here.store, version.model, version.version, "pass", {"champion": champion}, version.run_id
    )
    return adapters.promote(here.store, verdict, by_whom="bench", person=True)


def words_in(text: str) -> set[str]:
    """Which adapters must have spoken: one, none, or both in a mixed answer."""
    return {name for word, name in WORDS.items() if word in text}


def text_of(raw: bytes, *, stream: bool) -> str:
    """What a complete answer says. Raises ValueError for an incomplete one, or one with an error in it."""
    if not stream:
        return str(json.loads(raw)["choices"][0]["message"]["content"])
    parts = [line.removeprefix(b"data: ") for line in raw.splitlines() if line.startswith(b"data: ")]
    if not parts or parts[-1] != b"[DONE]" or b'"error"' in raw:
        raise ValueError(f"a stream without its end: {raw[-200:]!r}")
    return "".join(json.loads(part)["choices"][0]["delta"].get("content") or "" for part in parts[:-1])

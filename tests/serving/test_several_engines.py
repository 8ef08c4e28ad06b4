"""A whole server with a serve recipe, as a person starts it: `ft serve up recipes/desk.yaml`, in its own processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from jobs.fetch_base import fetch_base
from registry.base_models import BaseModel
from registry.cards import pick_card
from registry.errors import Conflict
from registry.project import Project
from registry.recipe import Base, Serve
from registry.settings import Settings, load_settings
from registry.store import Store
from serving.control import engine_for, server_status, start_server, stop_server
from serving.server_record import ServerStatus, is_gone
from serving.to_serve import only_engine
from tests.conftest import ROOT, run_bounded
from tests.serving.small_fleet import add_champion, save_base, small_vllm

ENGINE = {"card": "cpu", "max_context": 256, "concurrency": 4}
ENGINES = {
    "first": {"base": "./first", **ENGINE},
    "second": {"base": "./second", **ENGINE},
    "big": {"base": "./big", **ENGINE, "start": "demand", "idle": "1h", "residence": "1s"},
}


@dataclass(frozen=True)
class Desk:
    project: Project
    store: Store
    settings: Settings
    bases: dict[str, BaseModel]

    @property
    def status(self) -> ServerStatus:
        found = server_status(self.store)
        assert found is not None
        return found

    def ft(self, *arguments: str) -> tuple[int, str, str]:
        command = [sys.executable, "-m", "cli.main", *arguments]
        done = run_bounded(command, timeout=90, cwd=self.project.root)
        return done.returncode, done.stdout, done.stderr

    def ask(self, model: str) -> tuple[str, str]:
        """Which version answered, and the base that it is on."""
        body = {"model": model, "messages": [{"role": "user", "content": "?"}]}
        request = urllib.request.Request(
            f"{self.status.gateway_url}/v1/chat/completions", json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=30) as answer:
            return str(answer.headers["x-ft-adapter"]), json.load(answer)["choices"][0]["message"]["content"]


@pytest.fixture
def desk(project: Project, store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    for shared in (project.models, project.envs):
        shared.unlink()
        shared.mkdir()
    small_vllm(project)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (project.root / "ft.yaml").write_text("gateway_port: 0\ndrain_seconds: 5\n", encoding="utf-8")
    (project.root / "recipes" / "desk.yaml").write_text(
        yaml.safe_dump({"kind": "serve", "engines": ENGINES}, sort_keys=False), encoding="utf-8"
    )
    bases = {}
    for name in ENGINES:
        save_base(project.root / name, len(name))
        bases[name] = fetch_base(project, Base(model=f"./{name}", licence="MIT"))
        add_champion(project, store, f"on-{name}", bases[name])
    here = Desk(project, store, load_settings(project), bases)
    yield here
    if not is_gone(store):
        assert stop_server(store, here.settings)


def test_a_serve_recipe_from_its_start_to_its_end(desk: Desk) -> None:
    code, out, err = desk.ft("serve", "up", "recipes/desk.yaml", "--json")
    assert code == 0, err
    engines = json.loads(out)["engines"]
    assert {name: each["state"] for name, each in engines.items()} == {
        "first": "serving", "second": "serving", "big": "off",
    }  # fmt: skip
    assert engines["first"]["routes"] == {"on-first": "on-first@1"}
    assert desk.ask("on-first") == ("on-first@1", desk.bases["first"].folder)
    assert desk.ask("on-second") == ("on-second@1", desk.bases["second"].folder)
    status = desk.status
    assert (status.state, status.base["source"]) == ("serving", desk.bases["first"].source), "the first one's"
    assert status.routes == {"on-first": "on-first@1", "on-second": "on-second@1"}

    _kill_vllm(status, "second")
    _until(lambda: desk.status.engines["second"].starts == 2 and desk.status.state == "serving")
    assert desk.ask("on-second") == ("on-second@1", desk.bases["second"].folder)
    assert desk.status.engines["first"].starts == 1

    # A request for the model of an engine that is off starts it, and is held until it answers.
    assert desk.ask("on-big") == ("on-big@1", desk.bases["big"].folder)
    _until(lambda: bool(desk.status.engines["big"].start_seconds))
    code, out, _ = desk.ft("serve", "status")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines() if "(bf16)" in line] == ["first", "second", "big"]
    other = BaseModel("other", "1", "MIT", "digest", "other@1")
    with pytest.raises(Conflict, match="the server that runs is for"):
        start_server(desk.project, desk.store, desk.settings, only_engine(other, Serve(), pick_card("cpu")))
    assert desk.ft("serve", "down")[:2] == (0, "stopped\n")
    assert server_status(desk.store) is None


def test_an_evaluation_finds_the_engine_of_its_base_among_several(desk: Desk) -> None:
    assert desk.ft("serve", "up", "recipes/desk.yaml")[0] == 0
    serve, card = Serve(max_context=256), pick_card("cpu")

    async def who(name: str) -> tuple[str, str]:
        async with engine_for(desk.project, desk.store, desk.settings, desk.bases[name], serve, card) as engine:
            reply = await engine.chat("base", [{"role": "user", "content": "?"}])
            return engine.url, reply.text

    engines = desk.status.engines
    for name in ("first", "second"):
        assert asyncio.run(who(name)) == (engines[name].url, desk.bases[name].folder)
    assert desk.status.engine_on(desk.bases["big"].digest) == desk.status.engines["big"]
    # Nobody wants the third: the others give their card for as long as its evaluation takes.
    url, said = asyncio.run(who("big"))
    assert said == desk.bases["big"].folder
    assert url not in {each.url for each in engines.values()}
    _until(lambda: desk.status.state == "serving")


def _kill_vllm(status: ServerStatus, engine: str) -> None:
    group = status.engines[engine].pid
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            ours = os.getpgid(int(process.name)) == group and b"tests.fakes.small_vllm" in words
        except OSError:
            continue
        if ours:
            os.kill(int(process.name), signal.SIGKILL)


def _until(true: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)

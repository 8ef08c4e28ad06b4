"""Starting and finding a server without an engine: ports, locks, heartbeats."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from registry.base_models import BaseModel
from registry.cards import Card, pick_card
from registry.errors import Conflict, Trouble
from registry.project import Project
from registry.recipe import Serve
from registry.serve_recipe import load_serve_recipe
from registry.settings import Settings
from registry.store import Store
from serving.control import start_server
from serving.server import listen_as_gateway
from serving.server_keys import keys_path, read_keys, write_keys
from serving.server_record import (
    EngineStatus,
    ServerStatus,
    is_gone,
    only_server,
    server_status,
    unjudged_models,
    write_status,
)
from serving.to_serve import only_engine
from serving.vllm_process import EngineConfig, engine_rank, vllm_arguments

BASE = BaseModel("small", "1", "MIT", "digest", "small@1")
STATUS = ServerStatus(
    pid=os.getpid(),
    state="serving",
    reason="",
    base=BASE.as_dict(),
    serve=Serve().model_dump(),
    card="cpu",
    max_rank=8,
    gateway_url="http://127.0.0.1:1",
    started=time.time(),
)


@contextmanager
def another_server(store: Store) -> Iterator[None]:
    """Hold the server's lock as another process would: an open file of one's own is enough for flock."""
    with (store.home / "server.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def test_a_port_in_use_is_named_with_its_setting() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Trouble, match=str(port)) as raised:
            listen_as_gateway(Settings(gateway_port=port))
    assert "FT_GATEWAY_PORT" in raised.value.fix
    assert raised.value.exit_code == 1


def test_a_server_is_known_by_its_lock_and_its_heartbeat(store: Store) -> None:
    assert server_status(store) is None
    write_status(store, STATUS)
    assert server_status(store) is None, "nobody holds the lock: that server is dead"
    with another_server(store):
        found = server_status(store)
        assert found is not None
        assert replace(found, heartbeat=0) == STATUS
        with store.writing() as connection:
            connection.execute("UPDATE servers SET heartbeat = heartbeat - 60")
        assert server_status(store) is None, "not heard of for a minute"
    assert is_gone(store)


def test_only_the_server_that_runs_says_which_models_may_answer_unjudged(project: Project, store: Store) -> None:
    text = "kind: serve\nengines: {e: {base: org/base}}\nroutes: {a: {model: a, unjudged: true}, b: {model: b}}\n"
    path = project.root / "recipes" / "draft.yaml"
    path.write_text(text, encoding="utf-8")
    assert unjudged_models(store) == set(), "a recipe that only lies there allows nothing"
    recipe = load_serve_recipe(path).model_dump(mode="json", by_alias=True)
    write_status(store, replace(STATUS, recipe=recipe))
    assert unjudged_models(store) == {"a"}
    with store.writing() as connection:
        connection.execute("UPDATE servers SET heartbeat = heartbeat - 60")
    assert unjudged_models(store) == set(), "not heard of for a minute"


def test_a_server_with_that_engine_will_do_and_one_without_is_named(project: Project, store: Store) -> None:
    def asked(base: BaseModel) -> ServerStatus:
        return start_server(project, store, Settings(), only_engine(base, Serve(), pick_card("cpu")))

    engine = EngineStatus("main", "serving", "", BASE.as_dict(), Serve().model_dump(), "cpu", 8)
    write_status(store, replace(STATUS, engines={"main": engine}, recipe={"name": "desk"}))
    with another_server(store):
        assert asked(BASE).gateway_url == STATUS.gateway_url
        with pytest.raises(Conflict, match="is for small, not large"):
            asked(BaseModel("large", "1", "MIT", "another", "large@1"))


def test_one_server_per_project(project: Project, store: Store) -> None:
    with another_server(store), pytest.raises(Conflict, match="runs already"), only_server(project, store):
        pass
    with only_server(project, store) as still:
        assert not is_gone(store)
        assert still()
        write_keys(project, {"internal_key": "k"})
    assert read_keys(project) == {}


def test_a_server_whose_lock_was_removed_is_the_projects_server_no_more(project: Project, store: Store) -> None:
    lock = store.home / "server.lock"
    with only_server(project, store) as still:
        lock.unlink()
        assert not still()
        lock.touch()
        assert not still()
        write_keys(project, {"internal_key": "of the next server"})
    assert read_keys(project)


def test_keys_are_readable_by_their_owner_only(project: Project, store: Store) -> None:
    write_keys(project, {"internal_key": "k"})
    assert stat.S_IMODE(keys_path(project).stat().st_mode) == 0o600
    assert read_keys(project) == {"internal_key": "k"}


def test_which_server_serves_what_is_needed() -> None:
    card = Card("cpu", "", 0)
    assert STATUS.engine_for(EngineConfig(BASE, Serve(), card))
    assert not STATUS.engine_for(EngineConfig(replace(BASE, digest="other"), Serve(), card))
    assert not STATUS.engine_for(EngineConfig(BASE, Serve(max_context=4096), card))
    assert not STATUS.engine_for(EngineConfig(BASE, Serve(), Card("cuda-0", "", 0, 0)))


@pytest.mark.parametrize(("rank", "needs"), [(0, 8), (1, 8), (8, 8), (12, 16), (64, 64), (65, 128)])
def test_engine_rank(rank: int, needs: int) -> None:
    assert engine_rank(rank) == needs


def test_the_key_is_not_on_the_command_line_and_the_context_is_within_the_model(project: Project) -> None:
    folder = project.root
    (folder / "config.json").write_text('{"max_position_embeddings": 1024}', encoding="utf-8")
    arguments = vllm_arguments(EngineConfig(BASE, Serve(max_context=4096), Card("cpu", "", 0)), folder, 1234)
    assert arguments[arguments.index("--max-model-len") + 1] == "1024"
    assert "--enforce-eager" in arguments
    assert "--api-key" not in arguments

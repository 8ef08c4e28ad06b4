"""vLLM's environment: what makes it complete, and what is said when it cannot be made. (Engine tests make it.)"""

from __future__ import annotations

from pathlib import Path

import pytest

from registry.cards import pick_card
from registry.errors import MissingPart
from registry.project import Project
from registry.settings import Settings
from serving.vllm_env import ensure_vllm, vllm_is_ready


@pytest.fixture
def here(tmp_path: Path) -> Project:
    return Project(root=tmp_path, home=tmp_path / ".ft", cache=tmp_path / "cache")


def test_a_version_that_cannot_be_had_is_one_clear_error(here: Project) -> None:
    settings, card = Settings(vllm="0.0.0.dev1"), pick_card("cpu")
    said: list[str] = []
    for _ in range(2):
        with pytest.raises(MissingPart, match="vLLM cannot be installed") as raised:
            ensure_vllm(here, settings, card, said.append)
        assert raised.value.fix
    assert len(said) == 2
    assert not vllm_is_ready(here, settings, card)


def test_an_environment_without_its_ready_file_is_built_again(here: Project) -> None:
    settings, card = Settings(vllm="0.0.0.dev1"), pick_card("cpu")
    half = here.envs / "vllm-cpu-0.0.0.dev1"
    (half / "bin").mkdir(parents=True)
    (half / "bin" / "python").touch()
    (half / "left over").touch()
    with pytest.raises(MissingPart):
        ensure_vllm(here, settings, card)
    assert not (half / "left over").exists()


def test_a_complete_environment_is_taken_as_it_is(here: Project) -> None:
    settings, card = Settings(vllm="1.2.3"), pick_card("cpu")
    complete = here.envs / "vllm-cpu-1.2.3"
    (complete / "bin").mkdir(parents=True)
    (complete / "bin" / "python").touch()
    (complete / "ready.json").write_text("{}", encoding="utf-8")
    assert ensure_vllm(here, settings, card) == complete / "bin" / "python"

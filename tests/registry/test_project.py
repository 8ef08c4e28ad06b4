"""Where things lie: the project is found from below, and the environment moves its parts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from registry.errors import NotFound, WrongInput
from registry.project import Project, cache_folder, find_project


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "mine"
    (folder / "recipes" / "deep").mkdir(parents=True)
    (folder / "dvc.yaml").touch()
    monkeypatch.chdir(folder / "recipes" / "deep")
    return folder.resolve()


def test_the_project_is_the_nearest_above(root: Path) -> None:
    project = find_project()
    assert (project.root, project.home) == (root, root / ".ft")
    assert project.database == root / ".ft" / "ft.db"
    assert project.job_folder("x-1") == root / ".ft" / "jobs" / "x-1"
    assert project.adapter_folder("m", 3) == root / ".ft" / "adapters" / "m" / "3"
    assert find_project(root / "recipes") == project


def test_a_folder_dvc_will_do_as_well_as_its_file(root: Path) -> None:
    (root / "dvc.yaml").unlink()
    with pytest.raises(NotFound):
        find_project()
    (root / ".dvc").mkdir()
    assert find_project().root == root


def test_outside_of_any_it_is_said_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="this is not an ft project") as caught:
        find_project(tmp_path)
    assert (caught.value.place, "ft init DIR" in caught.value.fix) == (str(tmp_path), True)


def test_the_environment_moves_its_parts(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FT_PROJECT", str(root))
    monkeypatch.setenv("FT_HOME", "state")
    monkeypatch.setenv("FT_CACHE", str(tmp_path / "c"))
    project = find_project()
    assert project == Project(root, root / "state", tmp_path / "c")
    assert (project.models, project.envs, project.cards) == tuple(
        tmp_path / "c" / n for n in ("models", "envs", "cards")
    )


def test_dotenv_fills_in_what_is_not_set(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["# a comment", "export FT_HOME='other state'", 'FT_CACHE="~/c"', "FT_INTERNAL_KEY=a=b", "", "nonsense"]
    (root / ".env").write_text("\n".join(lines))
    monkeypatch.setenv("FT_CACHE", "/elsewhere")
    for name in ("FT_HOME", "FT_INTERNAL_KEY"):  # so that it is taken away again after the test
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    project = find_project()
    assert (project.home, project.cache) == (root / "other state", Path("/elsewhere"))
    assert os.environ["FT_INTERNAL_KEY"] == "a=b"


def test_the_cache_is_in_the_persons_home(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == (Path.home() / ".cache" / "ft").resolve()
    monkeypatch.setenv("FT_CACHE", "~/elsewhere")
    assert cache_folder() == (Path.home() / "elsewhere").resolve()


@pytest.mark.parametrize("content", ["FT_X=1".encode("utf-16"), b"FT_X=\xff\n", b"FT_X=a\0b\n"])
def test_a_dotenv_that_is_no_text_is_named(content: bytes, root: Path) -> None:
    (root / ".env").write_bytes(content)
    with pytest.raises(WrongInput) as caught:
        find_project(root)
    assert caught.value.place == str(root / ".env")


def test_a_dotenv_line_without_a_name_is_left_out(root: Path) -> None:
    (root / ".env").write_text("=1\n")
    find_project(root)

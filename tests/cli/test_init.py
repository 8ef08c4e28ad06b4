"""`ft init`: a project that runs, or nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from registry.chat_data import check_dataset, load_rows
from registry.dataset_versions import materialise, pin
from registry.project import Project, find_project
from registry.recipe import load_recipe
from registry.recipe_kinds import recipe_schema
from registry.tracked_data import tracked_datasets
from tests.conftest import ROOT, run_bounded

NOBODY = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null", "EMAIL": ""}
TEMPLATES = ROOT / "cli" / "templates" / "project"


def ft(cwd: Path, *arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return run_bounded([sys.executable, "-m", "cli.main", *arguments], timeout=60, cwd=cwd, env=env)


def git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Project:
    root = tmp_path_factory.mktemp("init") / "deep" / "shop"
    started = time.monotonic()
    done = ft(root.parent.parent, "init", "deep/shop", env=NOBODY)
    assert (done.returncode, done.stderr) == (0, "")
    assert time.monotonic() - started < 15  # 2 s on an idle machine; more says that something waits
    assert done.stdout.startswith("made deep/shop: recipes/tickets.yaml, and datasets/tickets as version ")
    assert done.stdout.endswith("\nnext: cd deep/shop && ft run recipes/tickets.yaml\n")
    return find_project(root)


def test_the_project_is_whole_and_committed(made: Project) -> None:
    assert git(made.root, "status", "--porcelain") == ""
    assert git(made.root, "log", "--format=%s by %an") == "A new ft project by ft"
    listed = git(made.root, "ls-files").split()
    assert {"recipes/tickets.yaml", "dvc.yaml", "dvc.lock", ".dvc/config", ".env.example", "README.md"} <= set(listed)
    assert not any(name.startswith((".ft/", "datasets/tickets/")) for name in listed)
    schema = json.loads((made.root / "docs" / "recipe.schema.json").read_text(encoding="utf-8"))
    assert schema == recipe_schema()


def test_its_recipe_runs_on_its_data(made: Project) -> None:
    recipe = load_recipe(made.root / "recipes" / "tickets.yaml")
    version = pin(made, recipe.data.path)
    assert version.rows == {"train": 320, "eval": 64, "test": 64}
    assert version.rows["train"] <= (recipe.data.max_train or 0) <= 360
    assert (recipe.data.max_test or 0) <= 60
    first = (made.root / "recipes" / "tickets.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert first == "# yaml-language-server: $schema=../docs/recipe.schema.json"


def test_its_data_can_be_pulled_from_its_own_remote(made: Project, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(made.root, root)
    shutil.rmtree(root / ".dvc" / "cache")
    shutil.rmtree(root / "datasets" / "tickets")
    copied = find_project(root)
    version = pin(copied, "datasets/tickets")
    materialise(copied, version, tmp_path / "data")
    assert check_dataset(tmp_path / "data") == version.rows


def test_a_ninth_label_is_a_new_version_that_keeps_the_old_rows(made: Project, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(made.root, root)
    params = root / "params.yaml"
    params.write_text(params.read_text(encoding="utf-8").replace("labels: 8", "labels: 9"), encoding="utf-8")
    done = run_bounded([sys.executable, "-m", "dvc", "repro", "-q"], timeout=60, cwd=root)
    assert done.returncode == 0, done.stderr
    before, after = pin(made, "datasets/tickets"), pin(find_project(root), "datasets/tickets")
    assert before.hash != after.hash
    assert after.rows == {"train": 360, "eval": 72, "test": 72}
    for split in after.rows:
        old = {row.question: row.answer for row in load_rows(made.root / before.path / f"{split}.jsonl")}
        new = {row.question: row.answer for row in load_rows(root / after.path / f"{split}.jsonl")}
        assert old.items() <= new.items()
        assert {new[question] for question in new.keys() - old.keys()} == {"wholesale"}


def test_half_of_the_test_rows_are_phrased_as_no_training_row_is(made: Project) -> None:
    rows = {split: load_rows(made.root / "datasets" / "tickets" / f"{split}.jsonl") for split in ("train", "test")}
    answers = sorted(row.answer for row in rows["test"])
    assert [answers.count(label) for label in sorted(set(answers))] == [8] * 8
    assert "van?" in "".join(row.question for row in rows["test"])
    assert "van?" not in "".join(row.question for row in rows["train"])


def test_a_folder_that_is_not_empty_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x", encoding="utf-8")
    for target in (tmp_path, tmp_path / "mine"):
        done = ft(tmp_path, "init", target, "--json")
        assert done.returncode == 2
        assert json.loads(done.stdout)["what"] == "is not an empty folder"
    assert [each.name for each in tmp_path.iterdir()] == ["mine"]


def test_nothing_stays_behind_when_it_fails(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "git").symlink_to(str(shutil.which("git")))
    without_python3 = {"PATH": str(tmp_path / "bin"), "SHELL": "/bin/sh"}
    for target in ("empty", "new/deep"):
        done = ft(tmp_path, "init", target, env=without_python3)
        assert done.returncode in (1, 2), done
        assert "tickets" in done.stderr
        assert "Traceback" not in done.stderr
    assert sorted(each.name for each in tmp_path.rglob("*") if each.name != "git") == ["bin", "empty"]


def test_without_git_it_says_what_is_missing(tmp_path: Path) -> None:
    done = ft(tmp_path, "init", "new", env={"PATH": str(tmp_path)})
    assert (done.returncode, done.stderr) == (1, "git is not installed\n  -> install git, then try again\n")
    assert list(tmp_path.iterdir()) == []


def test_inside_a_repository_it_becomes_a_part_of_it(tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet")
    done = ft(tmp_path, "init", "part", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["git"] is False
    assert not (tmp_path / "part" / ".git").exists()
    assert [each.path for each in tracked_datasets(find_project(tmp_path / "part"))] == ["datasets/tickets"]


def test_where_the_repository_around_ignores_it_it_gets_its_own(tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet")
    (tmp_path / ".gitignore").write_text("scratch/\n", encoding="utf-8")
    done = ft(tmp_path, "init", "scratch/demo")
    assert (done.returncode, done.stderr) == (0, "")
    assert git(tmp_path / "scratch" / "demo", "log", "--format=%s") == "A new ft project"
    assert git(tmp_path, "status", "--porcelain") == "?? .gitignore"


def test_the_repository_is_itself_such_a_project(made: Project) -> None:
    same = [
        ".dvc/config", ".dvc/.gitignore", ".dvcignore", ".env.example", "dvc.yaml", "dvc.lock", "params.yaml",
        "datasets/make_tickets.py", "recipes/tickets.yaml", "docs/recipe.schema.json",
    ]  # fmt: skip
    differing = [name for name in same if (made.root / name).read_bytes() != (ROOT / name).read_bytes()]
    assert differing == [], f"copy them from {TEMPLATES}, or from a project that `ft init` has made"


def test_every_template_is_in_the_wheel(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT / "cli", source / "cli", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    build = "import sys, setuptools.build_meta as b; b.build_wheel(sys.argv[1])"
    done = run_bounded([sys.executable, "-c", build, tmp_path], timeout=120, cwd=source)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("cli/templates/")}
    files = {each for each in TEMPLATES.rglob("*") if each.is_file() and "__pycache__" not in each.parts}
    assert packed == {each.relative_to(ROOT).as_posix() for each in files}

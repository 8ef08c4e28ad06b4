"""The ft command: every command explains itself, errors are one paragraph and an exit code, and help comes at once."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from cli.main import COMMANDS, app
from registry.project import Project
from tests.conftest import ROOT, run_bounded

FT = [sys.executable, "-m", "cli.main"]
HEAVY = ("pydantic", "rich", "mlflow", "dbos", "torch", "sqlalchemy", "yaml", "numpy")
ALWAYS_JSON = {"recipe schema"}  # prints nothing but JSON
WRONG_RECIPE = "kind: finetune\nbase: x/y\ndata: {path: d}\nevaluate: {task: label}\nspeed: 1\n"


def leaves(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Any]]:
    """(what a person types, click command) of a command, or of each command of a sub-app."""
    monkeypatch.setattr(sys, "argv", ["ft", name])
    group: Any = typer.main.get_command(app)
    context = group.make_context("ft", [name], resilient_parsing=True)
    command = group.get_command(context, name)
    if not hasattr(command, "commands"):
        yield name, command
    else:
        assert command.commands
        for sub, each in command.commands.items():
            yield f"{name} {sub}", each


def ft(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return run_bounded([*FT, *arguments], 60, env=env, cwd=cwd)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example_and_json(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for typed, command in leaves(name, monkeypatch):
        assert f"Example: ft {typed}" in command.help, typed
        options = {option for each in command.params for option in each.opts}
        assert "--json" in options or typed in ALWAYS_JSON, typed
        undescribed = [each.name for each in command.params if not getattr(each, "help", None)]
        assert undescribed == [], typed


def test_help_lists_every_command_with_what_it_does(tmp_path: Path) -> None:
    done = ft("--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for name, (_, _, help_) in COMMANDS.items():
        assert any(line.split() and line.split()[0] == name and help_[:20] in line for line in done.stdout.splitlines())


@pytest.mark.parametrize("name", ["run", "serve", "recipe"])
def test_each_commands_help_is_its_own(name: str, tmp_path: Path) -> None:
    done = ft(name, "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"Usage: ft {name} " in done.stdout


@pytest.mark.parametrize("command", ["--help", "runs", "models"])
def test_what_is_typed_often_comes_fast_and_imports_nothing_heavy(command: str, project: Project) -> None:
    code = f"import sys; sys.argv = ['ft', {command!r}]\nfrom cli.main import main\ntry: main()\nfinally: print([m for m in {HEAVY} if m in sys.modules])"  # noqa: E501
    done = run_bounded([sys.executable, "-c", code], 60, cwd=project.root)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    times = []
    for _ in range(7):
        began = time.perf_counter()
        ft(command, cwd=project.root)
        times.append(time.perf_counter() - began)
    # What it should take is measured elsewhere, on an idle machine; the fastest is least disturbed by others.
    assert min(times) < 0.4, statistics.median(times)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "No such command 'trian'"),
        (["run"], "Missing argument"),
        (["run", "x.yaml", "--fast"], "No such option: --fast"),
        (["recipe", "chekc"], "No such command 'chekc'"),
        (["runs", "--limit", "many"], "Invalid value for '--limit'"),
        (["runs", "-n", "9" * 20], "Invalid value for '--limit'"),
        (["events", "tail", "-n", "9" * 20], "Invalid value for '--lines'"),
        (["show", "\udcff"], "an argument is not UTF-8 text"),
        (["promote", "m@²"], "m has no '²'"),
        (["promote", "m@" + "9" * 20], "m has no '999"),
        (["recipe", "check", "recipes"], "recipes: a recipe is a file, and this is none"),
        (["recipe", "check", "x" * 5000], "cannot be read: File name too long"),
        (["data", "add", "d", "x.jsonl", "--eval-part", "nan"], "--eval-part: is no number"),
    ],
)
def test_what_is_typed_wrongly_exits_2(arguments: list[str], words: str, project: Project) -> None:
    done = ft(*arguments, cwd=project.root)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run", "recipes/nothing.yaml"], 2, "recipes/nothing.yaml: no such recipe"),
        (
            ["recipe", "check", "recipes/wrong.yaml"],
            2,
            "recipes/wrong.yaml:5: speed: unknown key; did you mean 'serve'?",
        ),
        (["show", "nothing-1"], 2, "no run 'nothing-1'"),
        (["logs", "nothing-1"], 2, "no run 'nothing-1'"),
        (["cancel", "nothing-1"], 2, "no run 'nothing-1'"),
        (["resume", "nothing-1"], 2, "no run 'nothing-1'"),
        (["rollback", "nothing"], 2, "nothing"),
    ],
)
def test_an_error_is_one_paragraph_with_its_exit_code(
    arguments: list[str], code: int, words: str, project: Project
) -> None:
    (project.root / "recipes" / "wrong.yaml").write_text(WRONG_RECIPE)
    done = ft(*arguments, cwd=project.root)
    assert (done.returncode, done.stdout) == (code, "")
    assert words in done.stderr
    assert "  -> " in done.stderr
    assert "Traceback" not in done.stderr
    assert "\033[" not in done.stderr  # no colours in a pipe
    as_json = ft(*arguments, "--json", cwd=project.root)
    assert as_json.returncode == code
    printed = json.loads(as_json.stdout)
    errors = printed.get("errors", [printed])
    assert all({"error", "what", "place", "fix"} == each.keys() for each in errors)


def test_a_database_that_cannot_be_used_is_trouble(project: Project) -> None:
    project.home.mkdir()
    project.database.write_text("not a database, but long enough to be looked at\n" * 100)
    done = ft("runs", cwd=project.root)
    assert done.returncode == 1
    assert "the project's database cannot be used: file is not a database" in done.stderr
    assert "Traceback" not in done.stderr


def test_debug_shows_where(project: Project) -> None:
    done = ft("--debug", "show", "nothing-1", cwd=project.root)
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    assert "NotFound" in done.stderr


def test_in_a_folder_that_is_gone_it_is_said(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    command = f"cd {gone} && rmdir {gone} && {sys.executable} -m cli.main runs"
    done = run_bounded(["sh", "-c", command], 60, env={"PYTHONPATH": str(ROOT)})
    assert (done.returncode, "the folder that you are in is gone" in done.stderr) == (2, True)


def test_a_fifo_is_no_data(project: Project) -> None:
    os.mkfifo(project.root / "rows.jsonl")
    done = ft("data", "add", "d", "rows.jsonl", cwd=project.root)
    assert (done.returncode, "rows.jsonl: is not a file" in done.stderr) == (2, True)


def test_outside_of_a_project_it_is_said_how_to_make_one(tmp_path: Path) -> None:
    done = ft("runs", cwd=tmp_path)
    assert done.returncode == 2
    assert "ft init DIR" in done.stderr


def test_a_reader_that_goes_away_is_no_error(project: Project) -> None:
    done = run_bounded(["sh", "-c", f"{sys.executable} -m cli.main recipe schema | head -c 10"], 60, cwd=project.root)
    assert (done.stderr, len(done.stdout)) == ("", 10)


def test_recipes_are_checked_together(project: Project) -> None:
    good = WRONG_RECIPE.replace("speed: 1\n", "")
    for name, text in (("good", good), ("wrong", WRONG_RECIPE), ("worse", "kind: nothing\n")):
        (project.root / "recipes" / f"{name}.yaml").write_text(text)
    files = [f"recipes/{name}.yaml" for name in ("good", "wrong", "worse")]
    done = ft("recipe", "check", *files, cwd=project.root)
    assert done.returncode == 2
    assert done.stdout.startswith("recipes/good.yaml: ok, digest ")
    assert "recipes/wrong.yaml:5: speed" in done.stderr
    assert "recipes/worse.yaml:1: kind is 'nothing'" in done.stderr
    printed = json.loads(ft("recipe", "check", *files, "--json", cwd=project.root).stdout)
    assert list(printed["ok"]) == ["recipes/good.yaml"]
    assert len(printed["errors"]) == 2
    assert ft("recipe", "check", files[0], cwd=project.root).returncode == 0


def test_runs_of_an_empty_project(project: Project) -> None:
    assert json.loads(ft("runs", "--json", cwd=project.root).stdout) == []
    assert ft("runs", cwd=project.root).returncode == 0


WRONG_SURROUNDINGS: list[tuple[list[str], dict[str, str], str]] = [
    (["runs"], {"FT_HOME": "~nosuchuser/x"}, "FT_HOME=~nosuchuser/x: there is no such home folder"),
    (["runs"], {"FT_CACHE": "~nosuchuser"}, "FT_CACHE=~nosuchuser: there is no such home folder"),
    (["init", "/proc/foo"], {}, "/proc/foo: cannot be made"),
    (["data", "add", "a.dvc", "a.csv"], {}, "'a.dvc' is the name of one of DVC's records"),
    (["data", "add", "a", "a.csv", "--prompt", "q", "--answer", "a"], {}, "a.csv: not text: line 2 has a zero byte"),
]


@pytest.mark.parametrize(("arguments", "env", "said"), WRONG_SURROUNDINGS)
def test_wrong_surroundings_get_one_clear_line(
    project: Project, arguments: list[str], env: dict[str, str], said: str
) -> None:
    (project.root / "a.csv").write_bytes(b"q,a\nx\0y,z\n")
    done = ft(*arguments, cwd=project.root, **env)
    assert done.returncode in (1, 2)
    assert said in done.stderr
    assert "defect" not in done.stderr


def test_doctor_says_what_is_wrong_and_goes_on(project: Project) -> None:
    done = ft("doctor", "--json", cwd=project.root, FT_CACHE="/proc/y")
    findings = {each["subject"]: each for each in json.loads(done.stdout)["findings"]}
    assert (done.returncode, findings["cards"]["state"]) == (1, "missing")
    assert "FT_CACHE" in findings["cards"]["fix"]
    assert "worker" in findings


@pytest.mark.parametrize("text", ["- a", "just text", "[", "7"])
def test_settings_that_are_no_mapping_are_refused(project: Project, text: str) -> None:
    (project.root / "ft.yaml").write_text(text)
    for command in ("doctor", "prune"):
        done = ft(command, cwd=project.root)
        assert (done.returncode, "ft.yaml" in done.stderr, "gateway_port: 8100" in done.stderr) == (2, True, True)


def test_a_reader_that_goes_away_is_no_failure(project: Project) -> None:
    command = f"{sys.executable} -m cli.main events types --json | head -1; exit ${{PIPESTATUS[0]}}"
    for _ in range(3):
        done = run_bounded(["bash", "-c", command], 60, cwd=project.root)
        assert (done.returncode, done.stdout, done.stderr) == (0, "{\n", "")


def test_prune_asks_before_it_deletes(project: Project) -> None:
    shown = ft("prune", cwd=project.root)
    assert (shown.returncode, shown.stdout) == (0, "nothing has had its time\n")
    logs = project.home / "logs"
    logs.mkdir()
    (logs / "old.log").write_text("x" * 2000)
    os.utime(logs / "old.log", (1, 1))
    refused = ft("prune", cwd=project.root)
    assert (refused.returncode, "add --yes to do it" in refused.stderr) == (2, True)
    looked = json.loads(ft("prune", "--dry-run", "--json", cwd=project.root).stdout)
    assert looked == {"done": False, "bytes": 2000, "logs": {"number": 1, "bytes": 2000}}
    assert (logs / "old.log").stat().st_size == 2000
    done = json.loads(ft("prune", "--yes", "--json", "--vacuum", cwd=project.root).stdout)
    assert done == {"done": True, "bytes": 2000, "logs": {"number": 1, "bytes": 2000}}
    assert (logs / "old.log").stat().st_size == 0

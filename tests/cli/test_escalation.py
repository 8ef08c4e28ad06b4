"""What a recipe escalates to is looked at before anything is submitted, and `ft approve` says what a yes starts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from registry import approvals, runs
from registry.project import Project
from registry.store import Store
from tests.conftest import run_bounded

BODY = {"kind": "finetune", "base": "org/base", "data": {"path": "datasets/plans"}, "evaluate": {"task": "text"}}


def ft(*arguments: str, cwd: Path) -> tuple[int, str]:
    done = run_bounded([sys.executable, "-m", "cli.main", *arguments], timeout=60, cwd=cwd)
    return done.returncode, done.stdout + done.stderr


def write(project: Project, name: str, model: str, to: str = "") -> Path:
    section = {"escalate": {"to": f"recipes/{to}.yaml", "max_usd": 50, "reference": 0.8}} if to else {}
    path = project.root / "recipes" / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**BODY, "model": model, **section}), encoding="utf-8")
    return path


@pytest.mark.parametrize("command", [("recipe", "check"), ("run",)])
def test_a_recipe_that_would_escalate_into_nothing_is_refused(project: Project, command: tuple[str, ...]) -> None:
    small = write(project, "small", "plans", to="large")
    code, said = ft(*command, str(small), cwd=project.root)
    assert (code, "no such recipe" in said) == (2, True), said
    write(project, "large", "other")
    code, said = ft(*command, "recipes/small.yaml", cwd=project.root)
    assert (code, "large.yaml is of model 'other'" in said) == (2, True), said


def test_check_reads_the_other_recipe_from_the_files_project(project: Project, tmp_path: Path) -> None:
    write(project, "large", "plans")
    small = write(project, "small", "plans", to="large")
    code, said = ft("recipe", "check", str(small), cwd=tmp_path)
    assert (code, "ok, digest" in said) == (0, True), said
    alone = tmp_path / "alone.yaml"
    alone.write_text(small.read_text(encoding="utf-8"), encoding="utf-8")
    code, said = ft("recipe", "check", str(alone), cwd=tmp_path)
    assert (code, "escalate.to: this is not an ft project" in said) == (2, True), said


def test_approve_lists_what_a_yes_starts(project: Project, store: Store) -> None:
    with store.writing() as connection:
        runs.submit_within(connection, "m-1", {"name": "m", "model": "m"}, "recipes/m.yaml", "d")
    runs.note_result(store, "m-1", escalated={"max_usd": 8.0})
    approvals.ask(store, "m-1", 1, "m", 3, seconds=99)
    asked = {"to": "recipes/large.yaml", "score": 0.3, "limit": 0.5, "max_usd": 8.0}
    approvals.ask(store, "m-1", 1, "m", 3, seconds=99, escalation=asked)
    _, said = ft("approve", cwd=project.root)
    assert "promotes it" in said
    assert "starts recipes/large.yaml, $8 at most" in said
    found = json.loads(ft("approve", "--json", cwd=project.root)[1])
    assert [each["starts"] for each in found] == ["", "recipes/large.yaml"]

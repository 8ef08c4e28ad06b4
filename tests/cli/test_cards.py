"""`ft cards`: memory, what is taken of it, and what becomes of serving there."""

from __future__ import annotations

import json
import sys

import pytest

from registry.cards import GIB, Card, pick_card, try_lock_beside
from registry.hosts import beat
from registry.project import Project
from registry.store import Store
from tests.conftest import run_bounded

DESK = Card("cuda-0", "NVIDIA GeForce RTX 3070", 8 * GIB, 0, 2 * GIB, "8.6", keep_free=GIB, serve="share")


def ft(project: Project, *arguments: str) -> str:
    done = run_bounded([sys.executable, "-m", "cli.main", *arguments], timeout=60, cwd=project.root)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(autouse=True)
def _attic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FT_HOST", "attic")


def test_cards_are_shown_with_what_is_taken_and_how_they_serve(project: Project, store: Store) -> None:
    beat(store, "desk", 1.0, [DESK])
    (project.root / "ft.yaml").write_text("cards: {cpu: {keep_free_gb: 2, serve: never}}\n", encoding="utf-8")
    attic, desk = ft(project, "cards").splitlines()[1:3]
    assert attic.split()[:1] == ["attic/cpu"]
    assert " 2.0 GiB  never " in attic
    assert desk.startswith("desk/cuda-0  NVIDIA GeForce RTX 3070")
    assert " 8.0 GiB   3.0 GiB  share " in desk
    found = json.loads(ft(project, "cards", "--json"))[1]
    assert (found["memory"], found["taken"], found["used"]) == (8 * GIB, 3 * GIB, 2 * GIB)
    assert (found["serve"], found["capability"]) == ("share", "8.6")


def test_a_server_that_shares_a_card_is_named(project: Project, store: Store) -> None:
    lock = try_lock_beside(project, pick_card("cpu"), "ft serve, pid 7", GIB)
    assert lock is not None
    assert "free, shared by ft serve, pid 7" in ft(project, "cards")
    lock.release()


def test_a_card_of_ft_yaml_that_is_nowhere_is_told(project: Project, store: Store) -> None:
    beat(store, "desk", 1.0, [DESK])
    settings = "cards: {cuda0: {serve: never}, 'cuda:0': {serve: never}, desk/cuda-0: {serve: never}, cpu: {}}\n"
    (project.root / "ft.yaml").write_text(settings, encoding="utf-8")
    assert "ft.yaml says something of cuda0, and there is no such card" in ft(project, "cards")

"""`ft serve` and `ft ask` where there is nothing to serve, and what they choose where there is."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from cli.serve import what_to_serve
from registry import adapters
from registry.base_models import BaseModel
from registry.errors import NotFound, WrongInput
from registry.project import Project
from registry.store import Store
from tests.conftest import run_bounded

SMALL = BaseModel("small", "1", "MIT", "digest-of-small", "small@1")
LARGE = BaseModel("large", "1", "MIT", "digest-of-large", "large@1")


def ft(project: Project, *arguments: str) -> tuple[int, str, str]:
    done = run_bounded([sys.executable, "-m", "cli.main", *arguments], timeout=60, cwd=project.root)
    return done.returncode, done.stdout, done.stderr


def champion(store: Store, model: str, base: BaseModel) -> None:
    body: dict[str, Any] = {"base": base.as_dict(), "rank": 8, "recipe": {"serve": {"max_context": 512}, "card": "cpu"}}
    adapters.add_version(store, model, 1, f"run-of-{model}", "", body)
    verdict = adapters.add_verdict(store, model, 1, "pass", {"champion": None}, None)
    adapters.promote(store, verdict, by_whom="test")


def test_without_a_server_each_command_says_so(project: Project, store: Store) -> None:
    code, out, _ = ft(project, "serve", "status", "--json")
    assert (code, json.loads(out)) == (1, {"state": "not running"})
    code, out, _ = ft(project, "serve", "down")
    assert (code, out) == (0, "no server runs\n")
    code, _, err = ft(project, "ask", "tickets", "hello")
    assert code == 1
    assert "ft serve up" in err


def test_the_one_champion_is_what_is_served(project: Project, store: Store) -> None:
    champion(store, "tickets", SMALL)
    champion(store, "letters", SMALL)
    base, serve, card = what_to_serve(project, store, "", print)
    assert (base, serve.max_context, card.name) == (SMALL, 512, "cpu")


def test_several_bases_need_a_choice(project: Project, store: Store) -> None:
    champion(store, "tickets", SMALL)
    champion(store, "letters", LARGE)
    with pytest.raises(WrongInput, match=r"tickets \(small\), letters \(large\)"):
        what_to_serve(project, store, "", print)
    assert what_to_serve(project, store, "letters", print)[0] == LARGE
    with pytest.raises(NotFound):
        what_to_serve(project, store, "nothing", print)


def test_nothing_to_serve_at_all(project: Project, store: Store) -> None:
    code, _, err = ft(project, "serve", "up")
    assert code == 2
    assert "ft run" in err

"""`ft serve` and `ft ask` where there is nothing to serve, and what they choose where there is."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import yaml

from cli.serve import what_to_serve
from registry import adapters
from registry.base_models import BaseModel
from registry.errors import NotFound, WrongInput
from registry.project import Project
from registry.serve_recipe import ServeRecipe
from registry.store import Store
from serving.to_serve import ToServe
from tests.conftest import run_bounded
from tests.serving.small_fleet import save_base

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
    what = what_to_serve(project, store, "", print)
    (terms,) = what.recipe.engines.values()
    assert (list(what.bases.values()), terms.max_context, terms.card) == ([SMALL], 512, "cpu")


def test_several_bases_need_a_choice(project: Project, store: Store) -> None:
    champion(store, "tickets", SMALL)
    champion(store, "letters", LARGE)
    with pytest.raises(WrongInput, match=r"tickets \(small\), letters \(large\)"):
        what_to_serve(project, store, "", print)
    assert what_to_serve(project, store, "letters", print).bases["engine"] == LARGE
    with pytest.raises(NotFound):
        what_to_serve(project, store, "nothing", print)


def test_nothing_to_serve_at_all(project: Project, store: Store) -> None:
    code, _, err = ft(project, "serve", "up")
    assert code == 2
    assert "ft run" in err


def test_a_serve_recipe_says_which_engines(project: Project, store: Store) -> None:
    project.models.unlink()  # the person's
    save_base(project.root / "small", 1)
    written = {"kind": "serve", "engines": {
        "small": {"base": "./small", "card": "cpu", "max_loras": 2},
        "theirs": {"url": "http://127.0.0.1:1"},
    }}  # fmt: skip
    path = project.root / "recipes" / "desk.yaml"
    path.write_text(yaml.safe_dump(written, sort_keys=False), encoding="utf-8")
    what = what_to_serve(project, store, str(path), print)
    assert (what.recipe.name, list(what.own()), list(what.lent())) == ("desk", ["small"], [])
    assert list(what.bases) == ["small"], "an address without a base needs none"
    again = ToServe(ServeRecipe.model_validate_json(what.recipe.model_dump_json(by_alias=True)), what.bases)
    assert again == what


def test_a_wrong_serve_recipe_is_told_of_before_anything_starts(project: Project, store: Store) -> None:
    path = project.root / "recipes" / "desk.yaml"
    path.write_text("kind: serve\nengines:\n  a: {base: ./a, card: cuda:7}\n", encoding="utf-8")
    code, _, err = ft(project, "serve", "up", "recipes/desk.yaml")
    assert code == 2
    assert "no base model here" in err
    path.write_text("kind: serve\nengines:\n  a: {start: demand}\n", encoding="utf-8")
    code, _, err = ft(project, "serve", "up", "recipes/desk.yaml")
    assert (code, "an engine has a `base` (ours) or a `url`" in err) == (2, True)

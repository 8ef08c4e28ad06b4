"""Serve recipes: engines, routes and rules, and what is wrong with them, with the line."""

from __future__ import annotations

from pathlib import Path

import pytest

from registry.errors import RecipeError
from registry.recipe import digest, load_recipe
from registry.recipe_kinds import load_any
from registry.serve_recipe import ServeRecipe, is_local, load_serve_recipe

GOOD = """kind: serve
engines:
  main: {base: mistralai/Mistral-7B-Instruct-v0.3, card: "cuda:0", pin: [support]}
  far: {url: "${BIG_URL}", key: "${BIG_KEY}", as: meta-llama/Llama-3.3-70B-Instruct}
routes:
  support:
    model: support
    fallbacks: [{engine: far}, {openai: gpt-4o-mini}]
    limits: {max_tokens: 512}
  private: {engine: main, local_only: true}
rules:
  - {when: {keywords: [환불, refund]}, route: support}
  - {when: {min_tokens: 2000}, route: private}
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "desk.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_serve_recipe_is_read_with_its_defaults(tmp_path: Path) -> None:
    recipe = load_serve_recipe(written(tmp_path, GOOD))
    assert recipe == load_any(written(tmp_path, GOOD))
    main, far = recipe.engines["main"], recipe.engines["far"]
    assert main.base is not None
    assert (recipe.name, main.base.model, main.start) == ("desk", "mistralai/Mistral-7B-Instruct-v0.3", "always")
    assert (is_local(main), is_local(far)) == (True, False)
    assert recipe.rules[0].when.keywords == ["환불", "refund"]
    assert recipe.routes["support"].limits.max_tokens == 512
    again = ServeRecipe.model_validate_json(recipe.model_dump_json(by_alias=True))
    assert digest(again) == digest(recipe)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("engine: far}", "engine: fra}"), "routes.support: no engine 'fra'; there are: main, far"),
        (("engine: main, local", "engine: far, local"), "routes.private: local_only, and engine 'far' is not local"),
        (("local_only: true", "local_only: true, openai: gpt-4o"), "local_only forbids OpenAI"),
        (
            ("as: meta", "card: gpu, sleep: true, as: meta"),
            "card, sleep: only of an engine of ours",
        ),
        (("pin: [support]", "pins: [support]"), "engines.main.pins: unknown key; did you mean 'pin'?"),
        (("{base: mistralai/Mistral-7B-Instruct-v0.3, card", "{card"), "an engine has a `base` (ours) or a `url`"),
        (('key: "${BIG_KEY}"', "key: sk-123"), "a key is not written out in a recipe"),
        (("{base: mistralai", "{volume: {requests: 2}, base: mistralai"), "this one is always up"),
        (
            ("engine: main, local", "engine: main, unjudged: true, local"),
            "`unjudged` is about versions of a registered model",
        ),
        (("limits: {max_tokens: 512}", "limits: {max_tokens: 0}"), "routes.support.limits.max_tokens"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    path = written(tmp_path, GOOD.replace(*change))
    with pytest.raises(RecipeError) as caught:
        load_serve_recipe(path)
    assert said in str(caught.value)
    assert caught.value.what.startswith(f"{path}:")


def test_each_command_says_which_kind_it_takes(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="kind is 'serve', and must be one of: finetune"):
        load_recipe(written(tmp_path, GOOD))

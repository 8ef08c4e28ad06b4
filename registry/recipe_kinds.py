"""All kinds of recipes: which one a file holds, and the JSON schema of any."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from registry.recipe import Finetune
from registry.recipe_file import read_recipe
from registry.recipe_part import Part
from registry.serve_recipe import ServeRecipe

AnyRecipe = Finetune | ServeRecipe
KINDS: dict[str, type[Part]] = {"finetune": Finetune, "serve": ServeRecipe}


def load_any(path: Path) -> AnyRecipe:
    """The recipe in the file, of whatever kind. Raises RecipeError with every error of the file."""
    found = read_recipe(path, KINDS)
    assert isinstance(found, Finetune | ServeRecipe)
    return found


def recipe_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of recipe files; name and model may be left out, base may be just a string."""
    either: TypeAdapter[AnyRecipe] = TypeAdapter(Annotated[AnyRecipe, Field(discriminator="kind")])
    schema = either.json_schema()
    schema["$defs"]["Base"] = {"anyOf": [{"type": "string"}, schema["$defs"]["Base"]]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "ft recipe", **schema}

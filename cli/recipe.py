"""`ft recipe`: check recipes, print their JSON schema."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from registry.recipe import Recipe

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.command()
def check(
    files: Annotated[list[Path], typer.Argument(help="Recipe files")],
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False,
) -> None:
    """Report every error of every file, with its line. Exit code 2 if there is any.

    Example: ft recipe check recipes/*.yaml
    """
    from cli.console import print_json, say
    from registry.errors import RecipeError
    from registry.recipe import Finetune, digest
    from registry.recipe_kinds import load_any

    errors, good = [], {}
    for file in files:
        try:
            loaded = load_any(file)
            if isinstance(loaded, Finetune):
                _check_escalation(file, loaded)
            good[str(file)] = digest(loaded)
        except RecipeError as error:
            errors.append(error)
    if as_json:
        print_json({"ok": good, "errors": [error.as_dict() for error in errors]})
    else:
        for name, hash_ in good.items():
            say(f"{name}: ok, digest {hash_[:12]}")
    if errors and as_json:
        raise typer.Exit(2)
    if errors:
        raise RecipeError("\n".join(str(error) for error in errors))


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors.

    Example: ft recipe schema > docs/recipe.schema.json
    """
    from cli.console import print_json
    from registry.recipe_kinds import recipe_schema

    print_json(recipe_schema())


def _check_escalation(file: Path, loaded: Recipe) -> None:
    """Its other recipe is read from the project that the file lies in."""
    from registry.errors import NotFound, RecipeError
    from registry.escalation import check_escalation
    from registry.project import find_project

    if loaded.escalate is None:
        return
    try:
        root = find_project(file.resolve().parent).root
    except NotFound as error:
        raise RecipeError(f"escalate.to: {error.what}", place=str(file), fix=error.fix) from error
    check_escalation(root, loaded, str(file))

"""`ft serve explain`: where a request would go, by which rule, and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from registry.project import Project
    from registry.serve_recipe import ServeRecipe
    from registry.store import Store
    from serving.explain import Explained


def explain(
    text: Annotated[str, typer.Argument(metavar="TEXT", help="The last user message")],
    model: Annotated[str, typer.Option("--model", help="The name that the caller asks for")] = "auto",
    key: Annotated[str, typer.Option("--key", metavar="NAME", help="The name of the caller's key")] = "",
    user: Annotated[str, typer.Option("--user", help="The request's `user`")] = "",
    header: Annotated[
        list[str] | None, typer.Option("--header", metavar="A=B", help="A header; may be given again")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="A serve recipe; that of the running server otherwise")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False,
) -> None:
    """Say which rule a request meets, why, and who would be asked in turn. Nothing is sent to anybody.

    Exit code 1 if nothing would answer, or the key may not ask.

    Example: ft serve explain "환불은 어떻게 받나요?" --key shop
    """  # fmt: skip
    import os

    from cli.console import print_json
    from registry.project import find_project
    from registry.store import open_store
    from serving.explain import explain as explained_by
    from serving.policy import Policy
    from serving.rules import Question

    project = find_project()
    store = open_store(project)
    found, where = _recipe(project, store, recipe)
    request: dict[str, Any] = {"messages": [{"role": "user", "content": text}], **({"user": user} if user else {})}
    question = Question(model, request, _headers(header or []), key)
    explained = explained_by(
        Policy.of(found), question, provider=os.environ.get("FT_PROVIDER", "local"), champions=_champions(store)
    )
    refused = _refused(store, key, model, explained.route)
    if as_json:
        print_json({**explained.as_dict(), "recipe": where, "refused": refused})
    else:
        _print(explained, where, refused)
    if refused or not explained.asks:
        raise typer.Exit(1)


def _recipe(project: Project, store: Store, file: Path | None) -> tuple[ServeRecipe | None, str]:
    """Of the file, else of the running server, else of the only serve recipe there is; (recipe, where it is from)."""
    from registry.serve_recipe import ServeRecipe, load_serve_recipe
    from serving.control import server_status

    if file is not None:
        return load_serve_recipe(file), str(file)
    running: dict[str, Any] = getattr(server_status(store), "recipe", None) or {}
    if running:
        return ServeRecipe(**running), "the running server's recipe"
    return _only_one(project)


def _only_one(project: Project) -> tuple[ServeRecipe | None, str]:
    import re

    from registry.errors import WrongInput
    from registry.serve_recipe import load_serve_recipe

    files = sorted((project.root / "recipes").glob("*.y*ml"))
    serving = [each for each in files if re.search(r"^kind:\s*[\"']?serve\b", _text(each), re.MULTILINE)]
    if len(serving) > 1:
        raise WrongInput(f"several serve recipes: {', '.join(each.name for each in serving)}",
                         place=str(project.root / "recipes"), fix="say which: --recipe FILE")  # fmt: skip
    if not serving:
        return None, "no serve recipe: every registered model answers by its own name"
    return load_serve_recipe(serving[0]), str(serving[0].relative_to(project.root))


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


def _headers(given: list[str]) -> dict[str, str]:
    from registry.errors import WrongInput

    found = {}
    for each in given:
        name, sign, value = each.partition("=")
        if not sign or not name:
            raise WrongInput(f"not a header: {each[:80]!r}", place="--header", fix="write it like x-tier=gold")
        found[name.lower()] = value
    return found


def _champions(store: Store) -> dict[str, str]:
    """Model -> `model@N`."""
    rows = store.read("SELECT model, version FROM aliases WHERE alias = 'champion'")
    return {row["model"]: f"{row['model']}@{row['version']}" for row in rows}


def _refused(store: Store, name: str, model: str, route: str) -> str:
    """Why the key may not ask that; '' if it may. Raises NotFound for a key that there is none of."""
    from registry.api_keys import api_keys
    from registry.errors import NotFound

    if not name:
        return ""
    found = {each.name: each for each in api_keys(store)}.get(name)
    if found is None:
        raise NotFound(f"no key '{name}'", fix="`ft keys list` shows all")
    if found.revoked is not None:
        return f"key '{name}' was revoked"
    asked = model.partition("@")[0]
    if found.routes is None or asked in found.routes or route in found.routes:
        return ""
    return f"key '{name}' may ask only {', '.join(found.routes)}"


def _print(explained: Explained, where: str, refused: str) -> None:
    from cli.console import say

    for each in explained.passed_over:
        say(f"  {each}")
    decided = f"rule {explained.rule}" if explained.rule else "no rule"
    say(f"{explained.model} -> {explained.route}   ({decided}: {explained.why})")
    for number, each in enumerate(explained.asks, start=1):
        say(f"  {'asks' if number == 1 else 'then'} {each}")
    if refused:
        say(f"  refused: {refused}")
    elif not explained.asks:
        say("  nothing answers there: `ft models` shows what has a champion")
    if explained.terms is not None and explained.terms.local_only:
        say("  nothing of it leaves this machine (local_only)")
    say(f"about {explained.tokens} tokens; by {where}")

"""`ft serve plan`: what should be served, what is, and what the server would do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from serving.serve_plan import ServePlan


def plan(
    what: Annotated[str, typer.Argument(metavar="[MODEL|RECIPE]", help="Without a server: whose base model")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False,
) -> None:
    """Print what should be served, what is, and what the server would do. Nothing is done.

    Example: ft serve plan
    """
    from cli.console import print_json, say
    from cli.serve import what_to_serve
    from registry.adapters import versions
    from registry.api_keys import api_keys
    from registry.base_models import BaseModel
    from registry.project import find_project
    from registry.serve_recipe import ServeRecipe, unjudged_in
    from registry.store import open_store
    from serving.serve_plan import load_plan, nowhere
    from serving.server_record import server_status

    project = find_project()
    store = open_store(project)
    status = server_status(store)
    if status:
        recipe, engines = ServeRecipe.model_validate(status.recipe), {each.name: each for each in status.all_engines()}
        bases = {name: BaseModel(**each.base) for name, each in engines.items()}
    else:
        served = what_to_serve(project, store, what, lambda _: None)
        recipe, engines, bases = served.recipe, {}, dict(served.bases)
    found = {}
    for name, base in bases.items():
        terms = recipe.engines[name]
        found[name] = load_plan(store, engines.get(name), base, terms.max_cpu_loras, terms.pin, unjudged_in(recipe))
    state = status.state if status else "not running"
    unknown = nowhere(recipe, {each.model for each in versions(store)}, api_keys(store))
    if as_json:
        print_json(
            {"server": state, "nowhere": unknown, "engines": {name: each.as_dict() for name, each in found.items()}}
        )
        return
    for name, each in found.items():
        _print(
            each,
            f"engine {name} ({engines[name].state if status else 'no server is up; if one were'})",
            bases[name].source,
        )
    for name in unknown:
        say(name)


def _print(found: ServePlan, head: str, base: str) -> None:
    from cli.console import say, table

    say(f"{head}; base {base}, room for {found.slots} adapters")
    rows = [
        [each.model, each.wanted or "-", each.answers or "-", "; ".join(each.todo) or "nothing", "; ".join(each.notes)]
        for each in found.lines
    ]
    if rows:
        table(["model", "should answer", "answers", "to do", "and"], rows)
    for name in found.unload:
        say(f"unload {name}: nothing wants it, or others need its room more")

"""`ft serve`: start, stop and see the gateway and its vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.serve_explain import explain
from cli.serve_gateway import gateway, gateways
from cli.serve_plan import plan
from cli.serve_status import print_status, rules, status

if TYPE_CHECKING:
    from registry.adapters import Version
    from registry.project import Project
    from registry.recipe import Finetune
    from registry.serve_recipe import ServeRecipe
    from registry.store import Store
    from serving.to_serve import ToServe

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

app.command()(gateway)
app.command()(gateways)

AsJson = Annotated[bool, typer.Option("--json", help="Print as JSON")]


@app.command()
def up(
    what: Annotated[
        str, typer.Argument(metavar="[MODEL|RECIPE]", help="A serve recipe, or whose base model to serve")
    ] = "",
    foreground: Annotated[bool, typer.Option("--foreground", help="Serve in this process, until Ctrl-C")] = False,
    as_json: AsJson = False,
) -> None:
    """Start the engines and the gateway; nothing to do where they run already.

    A recipe of `kind: serve` says which engines. Without an argument: one vLLM for the base model of the one model that
    has a champion, or of the one recipe there is.

    Example: ft serve up recipes/desk.yaml
    """
    from cli.console import print_json, say
    from registry.project import find_project
    from registry.settings import load_settings
    from registry.store import open_store
    from serving.control import start_server

    project = find_project()
    store, settings = open_store(project), load_settings(project)
    tell = (lambda _: None) if as_json else say
    found = what_to_serve(project, store, what, tell)
    if foreground:
        from serving.control import ensure_engines
        from serving.server import run_server

        ensure_engines(project, settings, found, tell)
        run_server(project, store, settings, found)
        return
    status = start_server(project, store, settings, found, tell)
    print_json(status.as_dict()) if as_json else print_status(status)


@app.command()
def down(as_json: AsJson = False) -> None:
    """Let the gateway finish what it answers, then stop it and its engines.

    Example: ft serve down
    """
    from cli.console import print_json, say
    from registry.project import find_project
    from registry.settings import load_settings
    from registry.store import open_store
    from serving.control import stop_server

    project = find_project()
    _refuse_supervised(project)
    stopped = stop_server(open_store(project), load_settings(project))
    if as_json:
        print_json({"stopped": stopped})
    else:
        say("stopped" if stopped else "no server runs")


app.command()(status)
app.command()(rules)
app.command()(explain)


app.command("plan")(plan)


def what_to_serve(project: Project, store: Store, what: str, say: Any) -> ToServe:
    """The engines of a serve recipe; one engine for a finetune recipe, a model, or the only one there is for ''."""
    if what.endswith((".yaml", ".yml")):
        return _of_recipe(project, Path(what), say)
    if what:
        from registry.adapters import find_version

        return _of_version(find_version(store, what))
    champions = _champions(store)
    bases = {each.body["base"]["digest"] for each in champions}
    if len(bases) == 1:
        return _of_version(champions[-1])
    if bases:
        from registry.errors import WrongInput

        named = ", ".join(f"{each.model} ({each.body['base']['source']})" for each in champions)
        raise WrongInput(f"there are champions on several base models: {named}", fix="say which: `ft serve up MODEL`")
    return _of_recipe(project, _only_recipe(project), say)


def _refuse_supervised(project: Project) -> None:
    from cli.up_folder import UpFolder
    from registry.errors import Conflict

    up = UpFolder(project.home)
    if up.is_up() and any(each["name"] == "serving" and each["pid"] for each in up.now()):
        raise Conflict("`ft up` keeps the server on and would start it again", place=str(project.home),
                       fix="`ft down` stops all parts; `ft up` without --serve then leaves it out")  # fmt: skip


def _champions(store: Store) -> list[Version]:
    from registry.adapters import get_version

    rows = store.read("SELECT model, version FROM aliases WHERE alias = 'champion' ORDER BY changed")
    return [get_version(store, each["model"], each["version"]) for each in rows]


def _of_version(version: Version) -> ToServe:
    from registry.base_models import BaseModel
    from registry.cards import pick_card
    from registry.recipe import Serve
    from serving.to_serve import only_engine

    recipe = version.body.get("recipe", {})
    card = pick_card(recipe.get("card", "auto"))
    return only_engine(BaseModel(**version.body["base"]), Serve(**recipe.get("serve", {})), card)


def _of_recipe(project: Project, path: Path, say: Any) -> ToServe:
    from registry.recipe import Finetune
    from registry.recipe_kinds import load_any

    recipe = load_any(path)
    return _of_finetune(project, recipe, say) if isinstance(recipe, Finetune) else _of_serve(project, recipe, say)


def _of_finetune(project: Project, recipe: Finetune, say: Any) -> ToServe:
    from jobs.fetch_base import fetch_base
    from registry.base_models import parse_reference, refuse_use
    from registry.cards import pick_card
    from serving.to_serve import only_engine

    reference = parse_reference(recipe.base.model, project.root)
    refuse_use(recipe.use, reference.name, recipe.base.licence or "")
    return only_engine(fetch_base(project, recipe.base, say), recipe.serve, pick_card(recipe.card))


def _of_serve(project: Project, recipe: ServeRecipe, say: Any) -> ToServe:
    """A base that is not in the cache yet is fetched, of an engine on demand too: nobody waits for a download then."""
    from jobs.fetch_base import fetch_base
    from serving.to_serve import ToServe

    wanted = {name: each.base for name, each in recipe.engines.items() if each.base and (not each.url or each.adapters)}
    return ToServe(recipe, {name: fetch_base(project, base, say) for name, base in wanted.items()})


def _only_recipe(project: Project) -> Path:
    from registry.errors import WrongInput

    found = sorted((project.root / "recipes").glob("*.y*ml"))
    if len(found) == 1:
        return found[0]
    there = ", ".join(path.name for path in found) or "none"
    raise WrongInput("no model has a champion, and there is not one recipe alone", place=f"recipes: {there}",
                     fix="say which: `ft serve up RECIPE`, or train one with `ft run RECIPE`")  # fmt: skip

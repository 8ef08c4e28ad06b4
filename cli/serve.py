"""`ft serve`: start, stop and see the gateway and its vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from registry.adapters import Version
    from registry.base_models import BaseModel
    from registry.cards import Card
    from registry.project import Project
    from registry.recipe import Serve
    from registry.store import Store
    from serving.server_record import ServerStatus

    What = tuple[BaseModel, Serve, Card]

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

AsJson = Annotated[bool, typer.Option("--json", help="Print as JSON")]


@app.command()
def up(
    what: Annotated[str, typer.Argument(metavar="[MODEL|RECIPE]", help="Whose base model to serve")] = "",
    foreground: Annotated[bool, typer.Option("--foreground", help="Serve in this process, until Ctrl-C")] = False,
    as_json: AsJson = False,
) -> None:
    """Start vLLM and the gateway; nothing to do where they run already.

    Without an argument: the base model of the one model that has a champion, or of the one recipe there is.

    Example: ft serve up
    """
    from cli.console import print_json, say
    from registry.project import find_project
    from registry.settings import load_settings
    from registry.store import open_store
    from serving.control import start_server

    project = find_project()
    store, settings = open_store(project), load_settings(project)
    tell = (lambda _: None) if as_json else say
    base, serve, card = what_to_serve(project, store, what, tell)
    if foreground:
        from serving.server import run_server
        from serving.vllm_env import ensure_vllm
        from serving.vllm_process import EngineConfig

        ensure_vllm(project, settings, card, tell)
        run_server(project, store, settings, EngineConfig(base, serve, card))
        return
    status = start_server(project, store, settings, base, serve, card, tell)
    print_json(status.as_dict()) if as_json else _print_status(status)


@app.command()
def down(as_json: AsJson = False) -> None:
    """Let the gateway finish what it answers, then stop it and vLLM.

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


@app.command()
def status(as_json: AsJson = False) -> None:
    """Show what is served, and the last swaps with the time of each part. Exit code 1 if no server runs.

    Example: ft serve status
    """
    from cli.console import print_json, say
    from registry.project import find_project
    from registry.store import open_store
    from serving.control import server_status

    found = server_status(open_store(find_project()))
    if as_json:
        print_json(found.as_dict() if found else {"state": "not running"})
    elif found:
        _print_status(found)
    else:
        say("no server runs; `ft serve up` starts one")
    if found is None:
        raise typer.Exit(1)


def what_to_serve(project: Project, store: Store, what: str, say: Any) -> What:
    """Base model, how to serve it, and where: of a recipe, of a model, or of the only one there is for ''."""
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


def _of_version(version: Version) -> What:
    from registry.base_models import BaseModel
    from registry.cards import pick_card
    from registry.recipe import Serve

    recipe = version.body.get("recipe", {})
    return BaseModel(**version.body["base"]), Serve(**recipe.get("serve", {})), pick_card(recipe.get("card", "auto"))


def _of_recipe(project: Project, path: Path, say: Any) -> What:
    from jobs.fetch_base import fetch_base
    from registry.base_models import parse_reference, refuse_use
    from registry.cards import pick_card
    from registry.recipe import load_recipe

    recipe = load_recipe(path)
    reference = parse_reference(recipe.base.model, project.root)
    refuse_use(recipe.use, reference.name, recipe.base.licence or "")
    return fetch_base(project, recipe.base, say), recipe.serve, pick_card(recipe.card)


def _only_recipe(project: Project) -> Path:
    from registry.errors import WrongInput

    found = sorted((project.root / "recipes").glob("*.y*ml"))
    if len(found) == 1:
        return found[0]
    there = ", ".join(path.name for path in found) or "none"
    raise WrongInput("no model has a champion, and there is not one recipe alone", place=f"recipes: {there}",
                     fix="say which: `ft serve up RECIPE`, or train one with `ft run RECIPE`")  # fmt: skip


def _print_status(found: ServerStatus) -> None:
    from cli.console import ago, say, table

    say(f"{found.state}{': ' if found.reason else ''}{found.reason}")
    say(f"gateway {found.gateway_url}/v1 (pid {found.pid}), base {found.base['source']} on card {found.card}")
    if found.routes:
        table(["model", "answers"], [[model, version] for model, version in found.routes.items()])
    if found.loaded:
        say(f"loaded: {', '.join(found.loaded)}")
    for version, reason in found.refused.items():
        say(f"refused {version}: {reason}")
    rows = [[each["version"], ago(each["at"]), _parts(each["seconds"])] for each in found.swaps[-5:]]
    if rows:
        table(["swap to", "when", "seconds of each part"], rows)


def _parts(seconds: dict[str, float]) -> str:
    return ", ".join(f"{part} {took:.2g}" for part, took in seconds.items())

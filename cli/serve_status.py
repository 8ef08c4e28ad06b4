"""`ft serve status` and `ft serve rules`: what answers, and how it keeps what was promised."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from registry.store import Store
    from serving.server_record import EngineStatus, ServerStatus

WATCH_SECONDS = 1.0


def status(
    watch: Annotated[bool, typer.Option("--watch", help="Again and again, until Ctrl-C")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False,
) -> None:
    """Show what is served, and the last swaps with the time of each part. Exit code 1 if no server runs.

    Example: ft serve status --watch
    """
    import time

    from cli.console import print_json, say
    from registry.project import find_project
    from registry.store import open_store
    from serving.control import server_status

    store = open_store(find_project())
    while True:
        found = server_status(store)
        if watch and not as_json:
            typer.echo("\033[H\033[2J", nl=False)
        if as_json:
            print_json(found.as_dict() if found else {"state": "not running"})
        elif found:
            print_status(found)
            _print_canaries(store)
        else:
            say("no server runs; `ft serve up` starts one")
        if not watch:
            break
        time.sleep(WATCH_SECONDS)
    if found is None:
        raise typer.Exit(1)


def rules(
    recipe: Annotated[Path | None, typer.Argument(help="A serve recipe; that of the running server otherwise")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False,
) -> None:
    """Print the objectives of a serve recipe as alert rules for Prometheus (docs/monitoring.md).

    Example: ft serve rules recipes/desk.yaml > rules.yml
    """
    from cli.console import print_json
    from serving.alert_rules import alert_rules, as_yaml
    from serving.kept_gateway import objectives_of

    found = objectives_of(_recipe(recipe))
    if not found:
        from registry.errors import NotFound

        raise NotFound("no route has `objectives:`", fix="docs/monitoring.md shows how to write them")
    found_rules = alert_rules(found)
    print_json(found_rules) if as_json else typer.echo(as_yaml(found_rules), nl=False)


def _recipe(path: Path | None) -> Any:
    from registry.errors import NotFound
    from registry.project import find_project
    from registry.serve_recipe import ServeRecipe, load_serve_recipe
    from registry.store import open_store
    from serving.control import server_status

    if path is not None:
        return load_serve_recipe(path)
    running = server_status(open_store(find_project()))
    if running is None:
        raise NotFound("no server runs", fix="name a recipe: `ft serve rules recipes/NAME.yaml`")
    return ServeRecipe.model_validate(running.recipe)


def print_status(found: ServerStatus) -> None:
    from cli.console import ago, say, table

    say(f"{found.state}{': ' if found.reason else ''}{found.reason}")
    say(f"gateway {found.gateway_url}/v1 (pid {found.pid})")
    engines = found.all_engines()
    rows = [*(_engine_row(each) for each in engines), *_elsewhere_rows(found)]
    table(["engine", "base", "card", "state"], rows)
    for each in engines:
        if each.given_up:
            say(f"engine {each.name}: {'; '.join(each.given_up)}")
    if found.routes:
        table(["model", "answers"], [[model, version] for model, version in found.routes.items()])
    if found.objectives:
        table(["route", "objective", "now", "promised", ""], [_objective(each) for each in found.objectives])
    if found.loaded:
        say(f"loaded: {', '.join(found.loaded)}")
    for version, reason in found.refused.items():
        say(f"refused {version}: {reason}")
    rows = [[each["version"], ago(each["at"]), _parts(each["seconds"])] for each in found.swaps[-5:]]
    if rows:
        table(["swap to", "when", "seconds of each part"], rows)


def _print_canaries(store: Store) -> None:
    from cli.console import say
    from registry.rollouts import running

    for each in running(store):
        say(f"canary: {each.name} answers {each.percent:g}% beside {each.stable}; `ft rollout {each.model}` has more")


def _engine_row(engine: EngineStatus) -> list[str]:
    told = engine.progress if engine.progress.startswith(engine.state) else engine.state
    state = f"{told}: {engine.reason}" if engine.reason else told
    where = engine.url if engine.card == "elsewhere" else engine.card
    return [engine.name, f"{engine.base.get('source', '-')} ({engine.precision})", where, state]


def _elsewhere_rows(found: ServerStatus) -> list[list[str]]:
    terms = found.recipe.get("engines", {})
    rows = [(name, terms.get(name, {}), why) for name, why in found.elsewhere.items()]
    return [
        [name, each.get("as") or "its own", each.get("url") or "", f"away: {why}" if why else "serving"]
        for name, each, why in rows
    ]


def _parts(seconds: dict[str, float]) -> str:
    return ", ".join(f"{part} {took:.2g}" for part, took in seconds.items())


def _objective(standing: dict[str, Any]) -> list[str]:
    now = "-" if standing["value"] is None else f"{standing['value']:.4g}"
    said = "broken" if standing["broken"] else ""
    return [standing["route"], standing["objective"], now, f"{standing['limit']:.4g}", said]

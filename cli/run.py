"""`ft run`: submit a recipe, see to it that a worker does it, and watch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from jobs.place import Placed
    from registry.project import Project
    from registry.recipe import Recipe
    from registry.store import Store


def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe file")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before money is spent")] = False,
    queue: Annotated[bool, typer.Option("--queue", help="Wait behind a run of this recipe that is on")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Do not watch; print the run's id")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON")] = False,
) -> None:
    """Run a recipe: train, judge, promote, serve. What it would rent is shown first, and asked for.

    Ctrl-C only stops watching; `ft cancel` stops the run. Exit code 3: the gate did not let the version through.

    Example: ft run recipes/tickets.yaml
    """
    from cli.console import print_json, say
    from cli.watch import exit_as, watch
    from jobs.worker_process import ensure_worker, submitting
    from registry import runs
    from registry.escalation import check_escalation
    from registry.folders import refuse_lending
    from registry.project import find_project
    from registry.recipe import digest, load_recipe
    from registry.store import open_store

    project = find_project()
    loaded = load_recipe(recipe)
    check_escalation(project.root, loaded, str(recipe))
    store = open_store(project)
    refuse_lending(project, store)
    check_inputs(project, store, loaded)
    if loaded.cloud is not None:
        _show_what_it_costs(project, store, loaded, yes=yes, quiet=as_json)
    with submitting(project):
        body = loaded.model_dump(mode="json")
        made = runs.submit(store, body, str(recipe), digest(loaded), queue=queue)
        ensure_worker(project)
    if detach:
        print_json({"run": made.id}) if as_json else say(made.id)
        return
    exit_as(watch(project, store, made.id, quiet=as_json), as_json)


def check_inputs(project: Project, store: Store, recipe: Recipe) -> None:
    """What can be told at once, before anything is submitted: data, base model and its licence, card."""
    from registry.base_models import parse_reference, refuse_use
    from registry.dataset_versions import pin
    from registry.folders import folder_id
    from registry.hosts import all_cards, choose_card, cut_off, hosts
    from registry.settings import load_settings

    pin(project, recipe.data.path)
    parse_reference(recipe.base.model, project.root)
    refuse_use(recipe.use, recipe.base.model, recipe.base.licence or "")
    if recipe.card != "runpod":
        known = hosts(store)
        cut = cut_off(known, folder_id(project.home), load_settings(project).bucket)
        choose_card(recipe.card, all_cards(known), (), {}, cut)


def _show_what_it_costs(project: Project, store: Store, recipe: Recipe, *, yes: bool, quiet: bool) -> None:
    """Where the plan would rent: what is there for it is checked, and a person asked. An own card costs nothing."""
    from cli.console import say
    from jobs.cloud_checks import check_cloud
    from jobs.place import place
    from registry.errors import WrongInput
    from registry.settings import load_settings

    settings = load_settings(project)
    if recipe.card == "runpod":
        check_cloud(project, settings, recipe)
    placed = place(project, store, settings, recipe)
    if placed.rent is None and placed.rent_to_evaluate is None:
        return
    if recipe.card != "runpod":
        check_cloud(project, settings, recipe)
    if not quiet:
        for line in _what_is_rented(placed):
            say(line)
    if yes:
        return
    if quiet or not sys.stdin.isatty():
        raise WrongInput("this would spend money, and nobody is there to be asked", place=recipe.name,
                         fix="look at `ft plan`, then `ft run --yes`")  # fmt: skip
    typer.confirm("rent it?", abort=True)


def _what_is_rented(placed: Placed) -> Iterator[str]:
    if placed.rent and placed.judged:
        here, seconds, usd = placed.judged.candidate, placed.judged.verdict.seconds, placed.judged.verdict.usd
        assert usd is not None
        yield _rents(here.name, here.place.usd_per_hour or 0.0, seconds.as_dict(), usd.as_dict())
    if placed.rent_to_evaluate:
        best = placed.rent_to_evaluate["expected"]
        line = _rents(best["name"], best["usd_per_hour"], best["seconds"], best["usd"])
        yield f"no own card can serve the base; to evaluate it {line}"


def _rents(name: str, usd_per_hour: float, seconds: dict[str, float], usd: dict[str, float]) -> str:
    hours = f"{seconds['low'] / 3600:.1f} to {seconds['high'] / 3600:.1f} h"
    return (f"rents {name} at ${usd_per_hour:.2f} an hour: {hours}, ${usd['low']:.2f} to ${usd['high']:.2f}; "
            "`ft plan` shows all")  # fmt: skip

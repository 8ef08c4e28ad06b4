"""`ft run`: submit a recipe, see to it that a worker does it, and watch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from registry.project import Project
    from registry.recipe import Recipe


def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe file")],
    queue: Annotated[bool, typer.Option("--queue", help="Wait behind a run of this recipe that is on")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Do not watch; print the run's id")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON")] = False,
) -> None:
    """Run a recipe: train, judge, promote, serve.

    Ctrl-C only stops watching; `ft cancel` stops the run. Exit code 3: the gate did not let the version through.

    Example: ft run recipes/tickets.yaml
    """
    from cli.console import print_json, say
    from cli.watch import exit_as, watch
    from jobs.worker_process import ensure_worker, submitting
    from registry import runs
    from registry.escalation import check_escalation
    from registry.project import find_project
    from registry.recipe import digest, load_recipe
    from registry.store import open_store

    project = find_project()
    loaded = load_recipe(recipe)
    check_escalation(project.root, loaded, str(recipe))
    check_inputs(project, loaded)
    store = open_store(project)
    with submitting(project):
        body = loaded.model_dump(mode="json")
        made = runs.submit(store, body, str(recipe), digest(loaded), queue=queue)
        ensure_worker(project)
    if detach:
        print_json({"run": made.id}) if as_json else say(made.id)
        return
    exit_as(watch(project, store, made.id, quiet=as_json), as_json)


def check_inputs(project: Project, recipe: Recipe) -> None:
    """What can be told at once, before anything is submitted: data, base model and its licence, card."""
    from registry.base_models import parse_reference, refuse_use
    from registry.cards import pick_card
    from registry.dataset_versions import pin

    pin(project, recipe.data.path)
    parse_reference(recipe.base.model, project.root)
    refuse_use(recipe.use, recipe.base.model, recipe.base.licence or "")
    pick_card(recipe.card)

"""`ft down`: stop what `ft up` started."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from registry.project import Project


def down(as_json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False) -> None:
    """Stop the parts that `ft up` keeps on, the last one first; each may finish what it answers. Waits for all.

    A training that is on goes on, and the next worker takes it up.

    Example: ft down
    """
    from cli.console import print_json, say
    from cli.supervising import stop_supervisor
    from cli.up_folder import UpFolder
    from registry.project import find_project

    project = find_project()
    stopped = stop_supervisor(UpFolder(project.home), (lambda _: None) if as_json else say)
    trainers, worker = _trainers(project), _other_worker(project)
    if as_json:
        print_json({"stopped": stopped, "training": trainers, "worker": worker})
        return
    say("down" if stopped else "nothing was up")
    for trainer in trainers:
        say(f"goes on: {trainer}; the next worker (`ft up`, `ft run`, `ft worker`) takes it up")
    if worker:
        say("goes on: a worker that `ft run` or somebody else started; it ends when it has nothing to do")


def _trainers(project: Project) -> list[str]:
    from registry.cards import holder, list_cards, pick_card

    cards = {card.name: card for card in [*list_cards(), pick_card("cpu")]}
    held = [(name, holder(project, card)) for name, card in cards.items()]
    return [f"{has} on card {name}" for name, has in held if has.startswith(f"trainer of {project.home}")]


def _other_worker(project: Project) -> bool:
    from jobs.worker_process import worker_is_on

    return worker_is_on(project)

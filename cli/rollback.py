"""`ft rollback`: make the previous champion answer again."""

from __future__ import annotations

from typing import Annotated

import typer


def rollback(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The model")],
    to: Annotated[int | None, typer.Option("--to", metavar="N", help="That version, not the previous one")] = None,
    reason: Annotated[str, typer.Option("--reason", help="Why; kept with the move")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False,
) -> None:
    """Make the previous champion (or version N) answer again. What it replaces needs a person to come back.

    Example: ft rollback tickets --reason "rude to customers"
    """
    from cli.champion import tell_move
    from cli.waking import noticing
    from registry import adapters
    from registry.project import find_project, user_name
    from registry.store import open_store

    project = find_project()
    store = open_store(project)
    with noticing(project):
        moved = adapters.roll_back(store, model, by_whom=user_name(), reason=reason, to=to)
    tell_move(project, store, moved, as_json=as_json)

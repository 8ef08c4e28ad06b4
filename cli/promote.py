"""`ft promote`: make a version the champion."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from registry.adapters import Verdict, Version
    from registry.store import Store


def promote(
    reference: Annotated[str, typer.Argument(metavar="MODEL@N", help="The version; a MODEL alone: its candidate")],
    reason: Annotated[str, typer.Option("--reason", help="Why; kept with the promotion")] = "",
    canary: Annotated[str, typer.Option("--canary", metavar="STEPS", help="Step by step: 5%:10m,50%:30m")] = "",
    force: Annotated[bool, typer.Option("--force", help="Even if the gate said no, or was not asked")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False,
) -> None:
    """Make a version the champion; a server that is up swaps to it at once, or by the steps of a canary.

    Example: ft promote tickets@3 --canary "5%:10m,50%:30m"
    """
    from cli.champion import tell_move, tell_rollout
    from cli.waking import noticing
    from registry import adapters, rollouts
    from registry.project import find_project, user_name
    from registry.rollout_terms import parse_canary
    from registry.store import open_store

    project = find_project()
    store = open_store(project)
    version = adapters.find_version(store, reference if "@" in reference else f"{reference}@candidate")
    terms = parse_canary(canary) if canary else None
    verdict = _verdict(store, version, force)
    if terms:
        with noticing(project):
            begun = rollouts.start(store, verdict, terms, by_whom=user_name(), reason=reason, person=True)
        tell_rollout(store, begun, as_json=as_json)
        return
    with noticing(project):
        moved = adapters.promote(store, verdict, by_whom=user_name(), reason=reason, person=True)
    tell_move(project, store, moved, as_json=as_json)


def _verdict(store: Store, version: Version, force: bool) -> Verdict:
    """What the gate said last. Raises GateClosed if that is no pass, and nobody forces it."""
    from registry.adapters import add_verdict, aliases, last_verdict
    from registry.errors import GateClosed

    verdict = last_verdict(store, version.model, version.version)
    if verdict is not None and (force or verdict.outcome == "pass"):
        return verdict
    if verdict is None and force:
        check = {"name": "forced", "outcome": "undecided", "text": "promoted by a person, never judged"}
        body = {"checks": [check], "champion": aliases(store, version.model).get("champion")}
        return add_verdict(store, version.model, version.version, "undecided", body, None)
    said = f"has no passing verdict ({verdict.outcome})" if verdict else "was never judged"
    raise GateClosed(
        f"{version.name} {said}",
        fix=f"judge it with `ft gate {version.name}`, or promote it all the same with --force",
    )

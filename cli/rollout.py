"""`ft rollout`: canaries; how far they are, what was seen of them, and a person's word."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from registry.rollouts import Rollout
    from registry.store import Store

ACTIONS = ("advance", "cancel")


def rollout(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[advance|cancel] [MODEL]", help="What to do, of which model")
    ] = None,
    reason: Annotated[str, typer.Option("--reason", help="Why; kept with the rollout")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False,
) -> None:
    """Show rollouts. `advance MODEL` goes on to the next step now, `cancel MODEL` gives all callers the champion again.

    Example: ft rollout tickets
    """
    from cli.console import print_json
    from cli.waking import noticing
    from registry import rollouts
    from registry.project import find_project, user_name
    from registry.store import open_store

    project = find_project()
    store = open_store(project)
    action, model = _asked(words or [])
    if action:
        found = rollouts.running_of(store, model)
        done = rollouts.advance if action == "advance" else rollouts.cancel
        with noticing(project):
            done(store, found, by_whom=user_name(), reason=reason or f"{action} by {user_name()}")
        shown = [rollouts.get(store, found.id)]
    else:
        shown = rollouts.rollouts(store, model)
    print_json([_as_dict(store, each) for each in shown]) if as_json else _print(store, shown, model)


def _asked(words: list[str]) -> tuple[str, str]:
    """(action or '', model or ''). Raises WrongInput."""
    from registry.errors import WrongInput

    if len(words) == 2 and words[0] in ACTIONS:
        return words[0], words[1]
    if len(words) <= 1 and words[:1] not in ([each] for each in ACTIONS):
        return "", "".join(words)
    raise WrongInput(f"not understood: {' '.join(words)}", place="ft rollout",
                     fix="`ft rollout [MODEL]`, `ft rollout advance MODEL` or `ft rollout cancel MODEL`")  # fmt: skip


def _as_dict(store: Store, found: Rollout) -> dict[str, Any]:
    return {**found.as_dict(), "numbers": _numbers(store, found)}


def _numbers(store: Store, found: Rollout) -> dict[str, Any]:
    from serving.rollout_keeper import seen_of
    from serving.rollout_watch import numbers_of

    return numbers_of(seen_of(store, found))


def _print(store: Store, shown: list[Rollout], model: str) -> None:
    from cli.console import say, table

    if not shown:
        say(f"no rollout{' of ' + model if model else ''}; `ft promote MODEL@N --canary 5%:10m,50%:30m` begins one")
        return
    table(["version", "beside", "state", "percent", "step", "since", "why"], [_row(each) for each in shown])
    for each in shown:
        if each.state == "running":
            say(f"{each.name}: {each.held:.0f} of {each.terms.seconds_of(each.step)} s at {each.percent:g}%")
            _print_numbers(each, _numbers(store, each))


def _row(each: Rollout) -> list[str]:
    from cli.console import ago

    step, since = f"{each.step + 1}/{len(each.terms.steps)}", ago(each.ended or each.created)
    return [each.name, f"@{each.from_version}", each.state, f"{each.percent:g}%", step, since, each.reason]


def _print_numbers(each: Rollout, numbers: dict[str, Any]) -> None:
    from cli.console import table

    what = ("requests", "errors", "p95", "ratings", "rating")
    rows = [
        [name, *(_shown(numbers[f"{arm}_{one}"]) for one in what)]
        for arm, name in (("new", each.name), ("stable", each.stable))
    ]
    table(["", "requests", "failed", "p95 s", "ratings", "mean"], rows)


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:g}"

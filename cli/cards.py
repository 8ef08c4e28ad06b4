"""`ft cards`: the cards of all hosts, and taking one out of work for a while."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from registry.cloud_terms import CardSetting
    from registry.hosts import Host, HostCard
    from registry.project import Project
    from registry.settings import Settings
    from registry.store import Store

BY_BUCKET = "has another folder: jobs go through the bucket"
app = typer.Typer(add_completion=False, invoke_without_command=True, rich_markup_mode=None)
CARD = typer.Argument(metavar="CARD", help="CARD of this host, or HOST/CARD as `ft cards` shows it")
JSON = typer.Option("--json", help="Print as JSON")


@app.callback()
def cards(context: typer.Context, as_json: Annotated[bool, JSON] = False) -> None:
    """Show the cards of all hosts that share this project's database: what runs on each, and what waits for it.

    `taken` is what a trainer cannot have: what other programs hold, and what ft.yaml keeps free.

    Example: ft cards
    """
    if context.invoked_subcommand:
        return
    from cli.console import print_json, say, table
    from registry.project import find_project
    from registry.settings import load_settings
    from registry.store import open_store

    project = find_project()
    here = load_settings(project)
    settings = here.cards
    found = list(_lines(project, open_store(project), here))
    if as_json:
        print_json(found)
        return
    rows = [[each["card"], each["title"], _gib(each["memory"]), _gib(each["taken"]), each["serve"],
             ", ".join(filter(None, [each["state"], each["folder"]])), ", ".join(each["running"]),
             ", ".join(each["waiting"])] for each in found]  # fmt: skip
    table(["card", "", "memory", "taken", "serving", "state", "runs", "waiting"], rows)
    if strange := _strange(settings, [each["card"] for each in found]):
        say(f"ft.yaml says something of {', '.join(strange)}, and there is no such card")
    if not any(each["worker"] for each in found):
        say("no worker is on; `ft run` starts one, `ft worker` keeps one")


@app.command()
def pause(card: Annotated[str, CARD], as_json: Annotated[bool, JSON] = False) -> None:
    """Let nothing new begin on a card; what is at work on it goes on. Runs planned for it wait.

    Example: ft cards pause cuda-0
    """
    from registry.hosts import pause_card

    _change(card, pause_card, "paused", "is paused already", as_json)


@app.command()
def resume(card: Annotated[str, CARD], as_json: Annotated[bool, JSON] = False) -> None:
    """Let a paused card take work again.

    Example: ft cards resume cuda-0
    """
    from registry.hosts import resume_card

    _change(card, resume_card, "takes work", "is not paused", as_json)


def _change(card: str, change: Any, done: str, not_so: str, as_json: bool) -> None:
    from cli.console import print_json, say
    from registry.errors import Conflict
    from registry.hosts import all_cards, choose_card, hosts
    from registry.project import find_project, user_name
    from registry.store import open_store

    store = open_store(find_project())
    place = choose_card(card, all_cards(hosts(store)), (), {})
    if not change(store, place, user_name()):
        raise Conflict(f"{place.name} {not_so}", fix="`ft cards` shows all")
    print_json({"card": place.name, "state": done}) if as_json else say(f"{place.name}: {done}")


def _strange(settings: Mapping[str, CardSetting], names: list[str]) -> list[str]:
    """Cards of ft.yaml that no host has, by its name or with its host's."""
    known = {*names, *(name.partition("/")[2] for name in names)}
    return [name for name in settings if name.replace(":", "-") not in known]


def _lines(project: Project, store: Store, settings: Settings) -> Any:
    from registry.folders import folder_id, is_away
    from registry.hosts import all_cards, cut_off, hosts, pauses

    known, paused, planned = hosts(store), pauses(store), _planned(store)
    here = folder_id(project.home)
    cut = cut_off(known, here, settings.bucket)
    for place in all_cards(known, settings.cards):
        runs = planned.get(place.name, [])
        running = [run.id for run in runs if run.stage.split(":")[0] in ("train", "evaluate", "starting the engine")]
        host = next((each for each in known if each.id == place.host), None)
        yield {
            "card": place.name, "title": place.card.title, "memory": place.card.memory,
            "taken": place.card.memory - place.card.free, "used": place.card.used, "serve": place.card.serve,
            "capability": place.card.capability, "profile": place.card.profile, "worker": host is not None,
            "state": _state(project, place, host, place.name in paused), "running": running,
            "waiting": [run.id for run in runs if run.id not in running],
            "folder": cut.get(place.host) or (BY_BUCKET if is_away(place.folder, here) else ""),
        }  # fmt: skip


def _planned(store: Store) -> dict[str, list[Any]]:
    """Runs that are on, by the card that they were planned for, the oldest first."""
    from registry.runs import listed

    found: dict[str, list[Any]] = {}
    for run in reversed(listed(store, active=True, limit=1000)):
        if "host" in run.result:
            found.setdefault(f"{run.result['host']}/{run.result['card']}", []).append(run)
    return found


def _state(project: Project, place: HostCard, host: Host | None, paused: bool) -> str:
    from cli.console import ago
    from registry.cards import holder, holder_beside
    from registry.hosts import host_id

    words = ["paused"] if paused else []
    if place.host == host_id():
        words.append(f"held by {has}" if (has := holder(project, place.card)) else "free")
        words += [f"shared by {has}"] if (has := holder_beside(project, place.card)) else []
    elif host:
        words.append(f"its worker wrote {ago(host.seen)}")
    return ", ".join(words)


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB"

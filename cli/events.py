"""`ft events`: what happened, what followed from it, and why."""

from __future__ import annotations

import json
import sys
import time
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.sinks import sinks

if TYPE_CHECKING:
    from registry.events import Event
    from registry.project import Project
    from registry.store import Store
    from registry.triggers import Decision

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.command()(sinks)
JsonFlag = Annotated[bool, typer.Option("--json", help="Print as JSON")]


@app.command()
def tail(
    count: Annotated[int, typer.Option("--lines", "-n", min=0, max=1_000_000, help="The newest so many")] = 20,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes")] = False,
    type_: Annotated[str, typer.Option("--type", help="Only of this type")] = "",
    subject: Annotated[str, typer.Option("--subject", help="Only of this run, version, dataset or recipe")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="CloudEvents, one line each")] = False,
) -> None:
    """Show the newest events.

    Example: ft events tail -n 5 --type run.finished
    """
    from registry.events import newest
    from registry.project import find_project
    from registry.store import open_store

    store = open_store(find_project())
    start = newest(store, 1)
    shown = newest(store, count, type_=type_, subject=subject)
    for event in shown:
        _print_line(event, as_json)
    if follow:
        last = (shown or start)[-1:]
        _follow(store, last[0].seq if last else 0, type_, subject, as_json)


@app.command()
def emit(
    type_: Annotated[str, typer.Argument(metavar="TYPE", help="`ft events types` lists them; external.ANYTHING")],
    subject: Annotated[str, typer.Option("--subject", help="What it is about")] = "",
    data: Annotated[str, typer.Option("--data", help="A JSON object")] = "{}",
    source: Annotated[str, typer.Option("--source", help="Who says so")] = "ft/cli",
    id_: Annotated[str, typer.Option("--id", help="The same id of the same source is the same event")] = "",
    as_json: JsonFlag = False,
) -> None:
    """Append an event, as anything outside of ft might.

    Example: ft events emit external.nightly --data '{"branch": "main"}'
    """
    from cli.console import print_json, say
    from cli.waking import noticing
    from registry.event_types import check_event
    from registry.events import append, new_event
    from registry.project import find_project
    from registry.store import open_store

    event = new_event(_source(source), type_, subject, _object(data), key=id_)
    check_event(event)
    project = find_project()
    store = open_store(project)
    with noticing(project):
        new = append(store, event)
    if as_json:
        print_json({"id": event.id, "source": event.source, "appended": new})
    else:
        say(f"{event.id}" if new else f"{event.id}: the log has it already")


@app.command()
def why(
    what: Annotated[str, typer.Argument(metavar="RUN|EVENT", help="A run, or an event's id or number")],
    as_json: JsonFlag = False,
) -> None:
    """Say what started a run, or what an event started, and what it did not, and why.

    Example: ft events why tickets-1a2b3c4d5e
    """
    from cli.console import print_json
    from registry.project import find_project
    from registry.store import open_store

    project = find_project()
    store = open_store(project)
    told = [_story(project, store, event) for event in _meant(store, what)]
    if as_json:
        print_json(told)
        return
    for story in told:
        _tell(story)


@app.command()
def types(as_json: JsonFlag = False) -> None:
    """List the types of events, what they mean, and what is in them.

    Example: ft events types
    """
    from cli.console import print_json, table
    from registry.event_types import TYPES

    if as_json:
        print_json({name: {"means": each.means, "schema": each.schema()} for name, each in TYPES.items()})
        return
    rows = [[name, each.subject, each.means, ", ".join([*each.must, *(f"{key}?" for key in each.may)])]
            for name, each in TYPES.items()]  # fmt: skip
    table(["type", "subject", "means", "data"], rows)


@app.command()
def receive(as_json: Annotated[bool, typer.Option("--json", help="Print where it listens as JSON")] = False) -> None:
    """Take webhooks and CloudEvents over HTTP, in the foreground, and append them to the log.

    Settings: receiver_host, receiver_port, receiver_token, github_secret, mlflow_webhook_secret (docs/triggers.md).

    Example: ft events receive
    """
    from cli.console import print_json, say
    from registry.project import find_project
    from registry.settings import load_settings
    from registry.store import open_store
    from serving.receiver import run_receiver

    project = find_project()
    settings = load_settings(project)
    tell = (lambda url: print_json({"url": url})) if as_json else (lambda url: say(f"receiving at {url}"))
    run_receiver(project, open_store(project), settings, tell)


def _follow(store: Store, last: int, type_: str, subject: str, as_json: bool) -> None:
    """Print what comes, for ever. A database that is restarted is waited for, however long that takes."""
    from registry.errors import StoreError
    from registry.events import read

    changes, away = store.database.changes(), False
    while True:
        try:
            for event in read(store, after=last, type_=type_, subject=subject):
                _print_line(event, as_json)
                last = event.seq
            away = False
            changes.wait(1.0, 0.1)
        except StoreError as error:
            if not away:
                print(f"{error.place}: {error.what}\n  waits until it is back", file=sys.stderr, flush=True)
            away = True
            time.sleep(1.0)


def _source(text: str) -> str:
    from registry.errors import WrongInput

    if not text or any(each.isspace() for each in text) or (text.startswith("ft/") and text != "ft/cli"):
        raise WrongInput(f"no source: {text!r}", place="--source", fix="a URI reference that does not begin with ft/")
    return text


def _object(text: str) -> dict[str, Any]:
    from registry.errors import WrongInput

    try:
        found = json.loads(text, parse_constant=_refuse_constant)
        json.dumps(found, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:  # half a surrogate pair is valid JSON, but no text
        raise WrongInput(f"not valid JSON: {error}", place="--data", fix="give a JSON object in quotes") from error
    if not isinstance(found, dict):
        raise WrongInput("data is a JSON object", place="--data", fix='like \'{"branch": "main"}\'')
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


def _meant(store: Store, what: str) -> list[Event]:
    """What started the run of that name; else the events of that id; else the event of that number."""
    from registry import runs
    from registry.decisions import decision_for
    from registry.errors import NotFound
    from registry.events import RUNS, at, find

    try:
        run_id = runs.get(store, what).id
    except NotFound:
        run_id = what  # a run that was pruned still has its events
    started = decision_for(store, run_id)
    if started:
        return at(store, str(started[0]))
    submitted = [each for each in find(store, run_id) if each.source == RUNS]
    found = submitted or find(store, what) or at(store, what)
    if not found:
        raise NotFound(f"no run and no event '{what}'", fix="`ft runs` and `ft events tail` list them")
    return found


def _story(project: Project, store: Store, event: Event) -> dict[str, Any]:
    """The event, what led to it, and what was decided for each recipe that has triggers."""
    from registry.decisions import CURSOR, decisions_on
    from registry.events import causes, cursor

    decided = decisions_on(store, event)
    is_decided = event.seq <= cursor(store, CURSOR)
    return {
        "event": event.as_dict(),
        "causes": [each.as_dict() for each in causes(store, event)],
        "decided": is_decided,
        "decisions": [vars(each) for each in [*decided, *(_deaf(project, event, decided) if is_decided else [])]],
    }


def _deaf(project: Project, event: Event, decided: list[Decision]) -> list[Decision]:
    """Recipes that have triggers now, and nothing was decided for them."""
    from registry.errors import FtError
    from registry.project import recipe_files
    from registry.recipe import Finetune
    from registry.recipe_kinds import load_any
    from registry.triggers import Decision, Subscriber, listens

    said = []
    for path in recipe_files(project):
        try:
            loaded = load_any(path)
        except FtError as error:
            if path.stem not in {each.recipe for each in decided}:
                said.append(Decision(path.stem, False, f"its recipe is wrong: {error.what}"))
            continue
        if isinstance(loaded, Finetune) and loaded.on and loaded.name not in {each.recipe for each in decided}:
            what = f"{event.type} of {event.subject or event.source}"
            heard = listens(Subscriber(loaded.name, loaded.model, loaded.data.path, loaded.on), event)
            why = "was another recipe, or a wrong one, when this was decided" if heard else f"has no trigger for {what}"
            said.append(Decision(loaded.name, False, why))
    return said


def _tell(story: dict[str, Any]) -> None:
    from cli.console import say

    event = story["event"]
    say(f"{event['time']}  {event['type']}  {event.get('subject', '')}  ({event['source']} {event['id']})")
    for each in story["causes"]:
        say(f"  because of {each['type']}  {each.get('subject', '')}  ({each['source']} {each['id']})")
    if event["type"] == "run.submitted" and not event.get("ftcause"):
        say("  a person started it")
    if not story["decided"]:
        say("  nobody has looked at it yet: `ft worker` does")
    for each in story["decisions"]:
        word = f"started {each['run_id']}" if each["fired"] else "did not start"
        say(f"  {each['recipe']}: {word}: {each['reason']}")


def _print_line(event: Event, as_json: bool) -> None:
    if as_json:
        print(json.dumps(event.as_dict(), ensure_ascii=False), flush=True)
        return
    when = datetime.fromtimestamp(event.time).strftime("%Y-%m-%d %H:%M:%S")
    data = "(pruned)" if event.pruned else _short(event.data)
    print(f"{event.seq:>6}  {when}  {event.type:20} {event.subject[:80]:32} {data}", flush=True)


def _short(data: dict[str, Any]) -> str:
    """On one line, and without what a terminal would obey."""
    text = ", ".join(f"{key}={value}" for key, value in data.items() if not isinstance(value, dict | list))[:100]
    return "".join(each if each.isprintable() else " " for each in text)

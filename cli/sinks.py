"""`ft events sinks`: where news goes, what waits, what was given up and why."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from registry.project import Project
    from registry.sinks import Sink
    from registry.store import Store


def sinks(
    test: Annotated[str, typer.Option("--test", metavar="NAME", help="Send this sink one test event now")] = "",
    retry: Annotated[str, typer.Option("--retry", metavar="NAME", help="Send what was given up again")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False,
) -> None:
    """List the sinks of ft.yaml: what was delivered, what waits, the last error.

    Example: ft events sinks --test team-chat
    """
    from registry.project import find_project
    from registry.settings import load_settings
    from registry.store import open_store

    project = find_project()
    store, known = open_store(project), load_settings(project).sinks
    _begin(store, known)
    if test:
        _test(_named(known, test), as_json)
    elif retry:
        _retry(project, store, _named(known, retry), as_json)
    else:
        _list(store, known, as_json)


def _begin(store: Store, known: tuple[Sink, ...]) -> None:
    """What happens from now on is for them, also before a worker is up."""
    from registry.outbox import begin

    for sink in known:
        begin(store, sink.name)


def _test(sink: Sink, as_json: bool) -> None:
    from cli.console import print_json, say
    from jobs.post_message import post
    from registry.errors import Trouble
    from registry.sink_message import message, trial_event
    from registry.sinks import masked

    sent = message(sink, trial_event(sink), time.time())
    answer = post(sent, sink.timeout)
    if not answer.fine:
        raise Trouble(f"did not take it: {answer.words}", place=f"sink {sink.name}: {masked(sent.url)}",
                      fix="correct ft.yaml, then test it again")  # fmt: skip
    if as_json:
        print_json({"sink": sink.name, "status": answer.status, "answer": answer.text, "seconds": answer.seconds})
    else:
        say(f"{sink.name}: {answer.words} ({answer.seconds * 1000:.0f} ms, {masked(sent.url)})")


def _retry(project: Project, store: Store, sink: Sink, as_json: bool) -> None:
    from cli.console import print_json, say
    from cli.waking import noticing
    from registry import outbox

    with noticing(project):
        count = outbox.retry(store, sink.name)
    if as_json:
        print_json({"sink": sink.name, "messages": count})
    else:
        say(f"{sink.name}: {count} messages are due now; `ft events sinks` shows what comes of them")


def _list(store: Store, known: tuple[Sink, ...], as_json: bool) -> None:
    from cli.console import ago, print_json, say, table
    from registry.outbox import states

    configured, told = {each.name: each for each in known}, states(store)
    rows = [_row(configured.get(name), state) for name, state in told.items()]
    if as_json:
        print_json(rows)
        return
    if not rows:
        say("no sinks: docs/triggers.md says how to name them in ft.yaml")
        return
    columns = ["sink", "to", "types", "delivered", "waiting", "given up", "state", "last error"]
    cells = [
        [each["name"], each["to"], " ".join(each["types"]), f"{each['delivered']} ({ago(each['delivered_at'])})",
         str(each["waiting"]), str(each["given_up"]), each["state"], each["error"] or "-"]
        for each in rows
    ]  # fmt: skip
    table(columns, cells)


def _row(sink: Sink | None, state: dict[str, Any]) -> dict[str, Any]:
    from registry.errors import FtError
    from registry.sinks import address_of, headers_of, key_of, masked

    to, fault, url = "-", "", ""
    try:
        if sink is not None:
            url = address_of(sink)
            to = masked(url)
            key_of(sink), headers_of(sink)
    except FtError as error:
        fault = f"{error.place}: {error.what}"
    return {
        "name": state["name"], "to": to, "types": sink.types if sink else [], "delivered": state["delivered"],
        "delivered_at": state["delivered_at"], "waiting": state["waiting"], "given_up": state["given_up"],
        "due": state["due"], "state": _state(sink, fault, url, state), "error": fault or state["error"],
        "error_at": state["error_at"],
    }  # fmt: skip


def _state(sink: Sink | None, fault: str, url: str, state: dict[str, Any]) -> str:
    from registry.sinks import digest_of

    if sink is None:
        return "not in ft.yaml"
    if fault:
        return "cannot be used here"
    if state["disabled"] == digest_of(url):
        return f"switched off (410): `ft events sinks --retry {sink.name}`"
    paused = state["paused_until"]
    return f"paused for {paused - time.time():.0f} s" if paused and paused > time.time() else "ok"


def _named(known: tuple[Sink, ...], name: str) -> Sink:
    from registry.errors import NotFound

    for sink in known:
        if sink.name == name:
            return sink
    names = ", ".join(each.name for each in known) or "none"
    raise NotFound(f"no sink '{name}' in ft.yaml", fix=f"there is: {names}")

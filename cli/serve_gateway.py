"""`ft serve gateway`: one more gateway in front of the engines of the server that leads; `gateways` shows them."""

from __future__ import annotations

from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print as JSON")]


def gateway(
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Where it listens; 0: any free port")] = 0,
    as_json: AsJson = False,
) -> None:
    """Answer as the leading server (`ft serve up`) says, with its engines, until Ctrl-C. As many as you like.

    Example: ft serve gateway --port 8101
    """
    from cli.console import print_json, say
    from registry.project import find_project
    from registry.serving_lead import leader
    from registry.settings import load_settings
    from registry.store import open_store
    from serving.gateway_only import run_gateway

    project = find_project()
    store = open_store(project)
    lead = leader(store)
    if (lead is None or lead.released) and not as_json:
        say("no server leads yet; this gateway answers as soon as `ft serve up` has started one")
    tell = (lambda url: print_json({"gateway_url": url})) if as_json else (lambda url: say(f"gateway {url}/v1"))
    run_gateway(project, store, load_settings(project), port, tell)


def gateways(as_json: AsJson = False) -> None:
    """Show who leads, what it has published, and how far each gateway has come.

    Example: ft serve gateways
    """
    from cli.console import ago, print_json, say, table
    from registry.gateways import gateways as rows
    from registry.project import find_project
    from registry.served_routes import newer
    from registry.serving_lead import leader
    from registry.store import open_store

    store = open_store(find_project())
    lead, served, found = leader(store), newer(store, 0), rows(store)
    if as_json:
        sets = ("in_flight", "wanted", "used")
        there = [{**vars(each), **{name: sorted(getattr(each, name)) for name in sets}} for each in found]
        shown = None if lead is None else {"host": lead.host, "epoch": lead.epoch, "since": lead.since}
        print_json({"leader": shown, "generation": served.generation if served else 0, "gateways": there})
        return
    if lead is None or served is None:
        say("no server has published routes yet; `ft serve up` starts one")
        return
    ended = ", ended" if lead.released else ""
    say(f"leader {lead.host}{ended} (epoch {lead.epoch}), generation {served.generation} {ago(served.published)}")
    lines = [
        [
            each.host,
            each.url,
            str(each.acknowledged),
            ", ".join(sorted(name for name, _ in each.in_flight)),
            ago(each.seen),
        ]
        for each in found
    ]
    if lines:
        table(["host", "gateway", "generation", "still answers by", "heard of"], lines)

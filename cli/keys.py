"""`ft keys`: who may ask the gateway, what, and how often."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from registry.api_keys import ApiKey
    from registry.store import Store

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None)

NAME = typer.Argument(metavar="NAME", help="Whose key it is: a person, an application")
JSON = typer.Option("--json", help="Print as JSON")


@app.command()
def add(
    name: Annotated[str, NAME],
    routes: Annotated[str, typer.Option("--routes", metavar="A,B", help="Public names that it may ask; else all")] = "",
    rate: Annotated[str, typer.Option("--rate", metavar="60/m", help="Requests in a time: 5/s, 60/m, 1000/h")] = "",
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Make a key and print it, this once: the store has only its SHA-256.

    A running gateway knows it within seconds. From the first key on, nobody asks without one.

    Example: ft keys add shop --routes support,auto --rate 60/m
    """
    from registry import api_keys
    from registry.project import user_name

    named = tuple(each.strip() for each in routes.split(",") if each.strip()) or None
    asked = api_keys.parse_rate(rate) if rate else None
    store = _store()
    was_first = not api_keys.api_keys(store)
    key = api_keys.add_key(store, name, routes=named, rate=asked, by_whom=user_name())
    _tell_key(name, key, as_json, first=was_first)


@app.command(name="list")
def list_(as_json: Annotated[bool, JSON] = False) -> None:
    """List the keys: what each may ask, and how often.

    Example: ft keys list
    """
    from cli.console import ago, print_json, say, table
    from registry.api_keys import api_keys

    found = [_facts(each) for each in api_keys(_store())]
    if as_json:
        print_json(found)
        return
    if not found:
        say("no keys: on this machine anybody may ask; `ft keys add NAME` makes one")
        return
    rows = [
        [each["name"], ", ".join(each["routes"] or ["all"]), each["rate"] or "-", ago(each["created"]),
         each["by_whom"], f"revoked {ago(each['revoked'])}" if each["revoked"] else "in use"]
        for each in found
    ]  # fmt: skip
    table(["key", "may ask", "rate", "made", "by", "state"], rows)


@app.command()
def revoke(
    name: Annotated[str, NAME],
    forget: Annotated[
        bool, typer.Option("--forget", help="As if it had never been: without any key this machine asks without one")
    ] = False,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Take a key back: within seconds it is answered 401.

    Example: ft keys revoke shop
    """
    from cli.console import print_json, say
    from registry import api_keys

    store = _store()
    if forget:
        api_keys.forget_key(store, name)
    else:
        api_keys.revoke_key(store, name)
    if as_json:
        print_json({"name": name, "forgotten" if forget else "revoked": True})
    else:
        others = "; callers still need a key, because of others (`ft keys list`)" if api_keys.api_keys(store) else ""
        say(f"{name}: forgotten{others}" if forget else f"{name}: revoked")


@app.command()
def rotate(name: Annotated[str, NAME], as_json: Annotated[bool, JSON] = False) -> None:
    """A new key under the same name, routes and rate; the old one is answered 401 within seconds.

    Example: ft keys rotate shop
    """
    from registry import api_keys
    from registry.project import user_name

    _tell_key(name, api_keys.rotate_key(_store(), name, by_whom=user_name()), as_json)


def _store() -> Store:
    from registry.project import find_project
    from registry.store import open_store

    return open_store(find_project())


def _tell_key(name: str, key: str, as_json: bool, *, first: bool = False) -> None:
    from cli.console import print_json, say

    if as_json:
        print_json({"name": name, "key": key})
        return
    say(key)
    say(f"this is the key of '{name}', shown only now; send it as `Authorization: Bearer {key[:6]}...`")
    if first:
        say("it is the first one: from now on every caller needs a key")


def _facts(key: ApiKey) -> dict[str, Any]:
    """Without the digest: nobody has a use for it."""
    rate = f"{key.burst} in {key.burst / key.rate:.0f} s" if key.rate else None
    return {
        "name": key.name, "routes": list(key.routes) if key.routes is not None else None, "rate": rate,
        "created": key.created, "by_whom": key.by_whom, "revoked": key.revoked,
    }  # fmt: skip

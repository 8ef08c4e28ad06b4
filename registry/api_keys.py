"""Keys of the gateway's callers. Only their SHA-256 is kept: a key is shown once, when it is made.

256 random bits need no slow hash: nobody can try them all, and a look-up costs no more than one digest.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import time
from dataclasses import dataclass

from registry.errors import Conflict, NotFound, WrongInput
from registry.recipe import NAME
from registry.store import Connection, Store

PREFIX = "ft-"
# What figures, the log and remembered answers call the internal key.
RESERVED = frozenset({"internal"})
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class ApiKey:
    """`routes`: public names that it may ask, all where None. `rate`: requests per second, with a `burst` of so many
    at once; no bound where None."""

    name: str
    digest: str
    routes: tuple[str, ...] | None
    rate: float | None
    burst: int
    created: float
    by_whom: str
    revoked: float | None = None


def add_key(
    store: Store, name: str, *, routes: tuple[str, ...] | None, rate: tuple[int, float] | None, by_whom: str
) -> str:
    """A new key, in clear; the store has its digest. `rate`: so many requests in so many seconds.

    Raises WrongInput for a name that is none, Conflict for one that is taken.
    """
    if not re.fullmatch(NAME, name):
        raise WrongInput(f"not a name: {name[:80]!r}", place="key", fix="small letters, digits, '.', '_' and '-'")
    if name in RESERVED:
        raise WrongInput(f"'{name}' has a meaning of its own in figures and logs", place="key", fix="choose another")
    key = PREFIX + secrets.token_urlsafe(32)
    with store.writing() as connection:
        if _row(connection, name):
            raise Conflict(f"there is a key '{name}' already", fix=f"`ft keys rotate {name}` makes a new one of it")
        connection.execute("DELETE FROM api_keys WHERE name = ?", (name,))
        connection.execute(
            "INSERT INTO api_keys (name, digest, routes, rate, burst, created, by_whom) VALUES (?,?,?,?,?,?,?)",
            (name, digest_of(key.encode()), None if routes is None else json.dumps(routes),
             rate[0] / rate[1] if rate else None, rate[0] if rate else 0, time.time(), by_whom),
        )  # fmt: skip
    return key


def rotate_key(store: Store, name: str, *, by_whom: str) -> str:
    """A new key under the old name; the old one is refused from now on. Raises NotFound."""
    key = PREFIX + secrets.token_urlsafe(32)
    with store.writing() as connection:
        _need(connection, name)
        connection.execute(
            "UPDATE api_keys SET digest = ?, created = ?, by_whom = ? WHERE name = ?",
            (digest_of(key.encode()), time.time(), by_whom, name),
        )
    return key


def revoke_key(store: Store, name: str) -> None:
    """Refused from now on. Raises NotFound."""
    with store.writing() as connection:
        _need(connection, name)
        connection.execute("UPDATE api_keys SET revoked = ? WHERE name = ?", (time.time(), name))


def forget_key(store: Store, name: str) -> None:
    """As if it had never been, in use or revoked. Raises NotFound."""
    with store.writing() as connection:
        if connection.execute("DELETE FROM api_keys WHERE name = ?", (name,)).rowcount == 0:
            raise NotFound(f"no key '{name}'", fix="`ft keys list` shows all")


def api_keys(store: Store) -> list[ApiKey]:
    """All, the revoked ones too."""
    rows = store.read("SELECT name, digest, routes, rate, burst, created, by_whom, revoked FROM api_keys ORDER BY name")
    return [
        ApiKey(**{**row, "routes": None if row["routes"] is None else tuple(json.loads(row["routes"]))}) for row in rows
    ]


def digest_of(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()


def parse_rate(text: str) -> tuple[int, float]:
    """`60/m` -> (60, 60.0): requests, seconds. Raises WrongInput."""
    found = re.fullmatch(r"([1-9][0-9]{0,6})/([smh])", text)
    if found is None:
        raise WrongInput(f"not a rate: {text[:40]!r}", place="--rate", fix="write it like 5/s, 60/m or 1000/h")
    return int(found[1]), UNITS[found[2]]


def _row(connection: Connection, name: str) -> bool:
    return (
        connection.execute("SELECT 1 FROM api_keys WHERE name = ? AND revoked IS NULL", (name,)).fetchone() is not None
    )


def _need(connection: Connection, name: str) -> None:
    if not _row(connection, name):
        raise NotFound(f"no key '{name}'", fix="`ft keys list` shows all")

"""`champion` moved by hand in MLflow: a request, decided in one transaction with what follows from it.

Granted, it is a promotion or a rollback like any other. Refused, our alias is to be told to MLflow again, and the
reason is kept until MLflow has it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from registry.adapters import add_verdict_within, last_verdict_within, promote_within, roll_back_within
from registry.errors import Conflict, FtError, GateClosed
from registry.events import append_within, new_event
from registry.store import Connection, Store

ALIAS, WHO = "champion", "mlflow"
UNJUDGED = {
    "checks": [{"name": "unjudged", "outcome": "undecided", "text": "never judged; the serve recipe allows it"}]
}
STANDING = """SELECT
    (SELECT version FROM aliases WHERE model = ? AND alias = 'champion') AS version,
    (SELECT projected FROM aliases WHERE model = ? AND alias = 'champion') AS projected,
    (SELECT version FROM aliases WHERE model = ? AND alias = 'previous') AS previous,
    (SELECT token FROM projections WHERE model = ? AND alias = 'champion') AS token,
    (SELECT count FROM projections WHERE model = ? AND alias = 'champion') AS count,
    (SELECT max(id) FROM promotions WHERE model = ?) AS moves,
    (SELECT count(*) FROM alias_refusals WHERE model = ? AND told = 0) AS refusals"""


@dataclass(frozen=True)
class Standing:
    """What MLflow's alias must be unless a person moved it. `told` and `moves` count what ft has done to it."""

    model: str
    version: int | None
    previous: int | None
    told: int
    moves: int


@dataclass(frozen=True)
class Refusal:
    """Of a move to `version` (None: the alias was deleted)."""

    id: int
    model: str
    version: int | None
    reason: str


def standing(store: Store, model: str) -> Standing | None:
    """None while ft itself has to tell MLflow, or does: then what is there says nothing of a person."""
    return _standing(store.first(STANDING, (model,) * 7), model)


def decide_request(store: Store, before: Standing, wanted: int | None, *, unjudged: bool = False) -> str | None:
    """Grant or refuse the move to `wanted`; the reason of a refusal, '' if it was granted.

    `unjudged`: the serve recipe allows versions of the model that no gate has passed.

    `before` was read before MLflow's alias was. None, and nothing done, if it no longer holds: then what was read may
    be ft's own doing.
    """
    with store.writing() as connection:
        row = connection.execute(STANDING, (before.model,) * 7).fetchone()
        if _standing(row, before.model) != before or wanted == before.version:
            return None
        subject = before.model if wanted is None else f"{before.model}@{wanted}"
        data = {"alias": ALIAS, "from": before.version, "to": wanted}
        asked = new_event("ft/mlflow", "alias.requested", subject, data)
        append_within(connection, asked)
        reason = _do(connection, before, wanted, asked.ref, unjudged)
        if reason:
            _refuse(connection, before, wanted, reason)
            data = {"alias": ALIAS, "reason": reason, "champion": before.version}
            append_within(connection, new_event("ft/mlflow", "alias.refused", subject, data, cause=asked.ref))
        return reason


def untold_refusals(store: Store, model: str = "") -> list[Refusal]:
    rows = store.read(
        "SELECT id, model, version, reason FROM alias_refusals WHERE told = 0 AND ? IN ('', model) ORDER BY id",
        (model,),
    )
    return [Refusal(**row) for row in rows]


def mark_refusal_told(store: Store, refusal: Refusal) -> None:
    with store.writing() as connection:
        connection.execute("UPDATE alias_refusals SET told = 1 WHERE id = ?", (refusal.id,))


def note_refusal_within(connection: Connection, model: str, version: int | None, reason: str) -> None:
    """Have MLflow show at the version why it does not answer."""
    connection.execute(
        "INSERT INTO alias_refusals (model, version, reason, created) VALUES (?,?,?,?)",
        (model, version, reason, time.time()),
    )


def _do(connection: Connection, before: Standing, wanted: int | None, cause: str, unjudged: bool) -> str:
    """Promote or roll back; why not, if neither may be."""
    model = before.model
    if wanted is None:
        return "`champion` was deleted in MLflow; ft moves it, and does not take it away"
    name = f"{model}@{wanted}"
    row = connection.execute(
        "SELECT rolled_back FROM versions WHERE model = ? AND version = ?", (model, wanted)
    ).fetchone()
    if row is None:
        return f"ft has no version {name}: it was registered in MLflow by hand, and never judged"
    if row["rolled_back"]:  # also where it is `previous`: it is that because it was worse
        return f"{name} was rolled back; a person may: `ft promote {name}`"
    verdict = last_verdict_within(connection, model, wanted)
    if verdict is None and unjudged:
        verdict = add_verdict_within(connection, model, wanted, "undecided", UNJUDGED, None)
    try:
        if verdict is None:
            raise GateClosed(f"{name} was never judged", fix=f"judge it with `ft gate {name}`")
        promote_within(connection, verdict, by_whom=WHO, reason="moved in MLflow", cause=cause, person=unjudged)
    except (GateClosed, Conflict) as error:
        if wanted != before.previous:
            return _said(error)
        return _go_back(connection, model, wanted, cause)
    return ""


def _go_back(connection: Connection, model: str, wanted: int, cause: str) -> str:
    try:
        roll_back_within(connection, model, by_whom=WHO, reason="moved back in MLflow", to=wanted, cause=cause)
    except Conflict as error:  # a rollout of another version is under way
        return _said(error)
    return ""


def _said(error: FtError) -> str:
    return f"{error.what}; {error.fix}" if error.fix else error.what


def _refuse(connection: Connection, before: Standing, wanted: int | None, reason: str) -> None:
    note_refusal_within(connection, before.model, wanted, reason)
    connection.execute("UPDATE aliases SET projected = NULL WHERE model = ? AND alias = ?", (before.model, ALIAS))


def _standing(row: Any, model: str) -> Standing | None:
    if row["token"] or row["refusals"] or row["projected"] != row["version"]:
        return None
    return Standing(model, row["version"], row["previous"], row["count"] or 0, row["moves"] or 0)

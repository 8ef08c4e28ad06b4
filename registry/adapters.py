"""Adapter versions and their aliases. This module alone moves `candidate`, `champion` and `previous`.

A move of `champion` is a row in `promotions`, compared and set in one transaction against the champion that the
verdict was made against. MLflow's aliases are projected from these rows (`registry/mlflow_mirror.py`).
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any

from registry.errors import Conflict, GateClosed, NotFound
from registry.events import append_within, by_run, new_event
from registry.store import Connection, Store, dump


@dataclass(frozen=True)
class Version:
    """One immutable adapter version: `model` / `version`, served as `model@version`.

    `folder` is relative to the project's `.ft`; `body` has base (see BaseModel), manifest (sha256), rank,
    recipe_digest, dataset, mlflow ids and what else the run noted. `pruned` is when the folder was deleted.
    """

    model: str
    version: int
    run_id: str
    folder: str
    body: dict[str, Any]
    created: float
    rolled_back: bool
    pruned: float | None = None

    @property
    def name(self) -> str:
        return f"{self.model}@{self.version}"


@dataclass(frozen=True)
class Verdict:
    """What a gate said of a version: 'pass', 'fail' or 'undecided', with every number in `body`."""

    id: int
    model: str
    version: int
    outcome: str
    body: dict[str, Any]
    run_id: str | None
    created: float


@dataclass(frozen=True)
class Promotion:
    """One move of `champion`; `kind` is 'promote' or 'rollback'."""

    id: int
    model: str
    version: int
    from_version: int | None
    kind: str
    run_id: str | None
    verdict: int | None
    by_whom: str
    reason: str
    created: float


def add_version(store: Store, model: str, version: int, run_id: str, folder: str, body: dict[str, Any]) -> Version:
    """Write down a version and make it `candidate`. The same run again gets what it got before."""
    with store.writing() as connection:
        row = connection.execute("SELECT version FROM versions WHERE run_id = ?", (run_id,)).fetchone()
        if row is None:
            connection.execute(
                "INSERT INTO versions (model, version, run_id, folder, body, created) VALUES (?,?,?,?,?,?)",
                (model, version, run_id, folder, dump(body), time.time()),
            )
            _set_alias(connection, model, "candidate", version)
            event = new_event("ft/adapters", "adapter.registered", f"{model}@{version}", {"run": run_id}, key=run_id,
                              cause=by_run(run_id))  # fmt: skip
            append_within(connection, event)
    return version_of_run(store, run_id)


def version_of_run(store: Store, run_id: str) -> Version:
    row = store.first("SELECT * FROM versions WHERE run_id = ?", (run_id,))
    if row is None:
        raise NotFound(f"run {run_id} has registered no version", fix=f"`ft show {run_id}` says how far it came")
    return _version(row)


def get_version(store: Store, model: str, version: int) -> Version:
    row = store.first("SELECT * FROM versions WHERE model = ? AND version = ?", (model, version))
    if row is None:
        raise NotFound(f"no version {model}@{version}", fix=f"`ft models {model}` lists them")
    return _version(row)


def find_version(store: Store, reference: str) -> Version:
    """The version that `MODEL`, `MODEL@N` or `MODEL@alias` means (champion where nothing is said)."""
    model, _, which = reference.partition("@")
    which = which or "champion"
    number = int(which) if re.fullmatch("[0-9]{1,9}", which) else aliases(store, model).get(which)
    if number is None:
        has = ", ".join(f"{alias} = {version}" for alias, version in aliases(store, model).items())
        raise NotFound(f"{model} has no '{which}'", fix=f"it has: {has or 'no version'}; `ft models` lists all models")
    return get_version(store, model, number)


def refuse_pruned(model: str, version: int, pruned: float | None) -> None:
    """Raises NotFound for a version whose folder was deleted."""
    if pruned is not None:
        when = datetime.fromtimestamp(pruned).strftime("%Y-%m-%d")
        what = f"the adapter of {model}@{version} was pruned on {when}"
        raise NotFound(what, fix=f"train it again with `ft run`; `ft models {model}` lists what is there")


def versions(store: Store, model: str = "") -> list[Version]:
    rows = store.read("SELECT * FROM versions WHERE ? IN ('', model) ORDER BY model, version", (model,))
    return [_version(row) for row in rows]


def aliases(store: Store, model: str) -> dict[str, int]:
    rows = store.read("SELECT alias, version FROM aliases WHERE model = ? ORDER BY alias", (model,))
    return {row["alias"]: row["version"] for row in rows}


def add_verdict(
    store: Store, model: str, version: int, outcome: str, body: dict[str, Any], run_id: str | None
) -> Verdict:
    """Write down what the gate said. A run that says the same again (its step was repeated) has said it once."""
    with store.writing() as connection:
        return add_verdict_within(connection, model, version, outcome, body, run_id)


def add_verdict_within(
    connection: Connection, model: str, version: int, outcome: str, body: dict[str, Any], run_id: str | None
) -> Verdict:
    """The same in a transaction of the caller's."""
    last = connection.execute(
        "SELECT * FROM verdicts WHERE model = ? AND version = ? ORDER BY id DESC LIMIT 1", (model, version)
    ).fetchone()
    said = (run_id, outcome, dump(body))
    if last and run_id and (last["run_id"], last["outcome"], last["body"]) == said:
        return verdict_of(last)
    row = connection.execute(
        "INSERT INTO verdicts (model, version, outcome, body, run_id, created) VALUES (?,?,?,?,?,?) RETURNING *",
        (model, version, outcome, dump(body), run_id, time.time()),
    ).fetchone()
    data = {"outcome": outcome, "verdict": row["id"]}
    append_within(connection, new_event("ft/gates", "adapter.judged", f"{model}@{version}", data, cause=by_run(run_id)))
    return verdict_of(row)


def last_verdict(store: Store, model: str, version: int) -> Verdict | None:
    row = store.first(
        "SELECT * FROM verdicts WHERE model = ? AND version = ? ORDER BY id DESC LIMIT 1", (model, version)
    )
    return verdict_of(row) if row else None


def last_verdict_within(connection: Connection, model: str, version: int) -> Verdict | None:
    row = connection.execute(
        "SELECT * FROM verdicts WHERE model = ? AND version = ? ORDER BY id DESC LIMIT 1", (model, version)
    ).fetchone()
    return verdict_of(row) if row else None


def promote(
    store: Store,
    verdict: Verdict,
    *,
    by_whom: str,
    run_id: str | None = None,
    reason: str = "",
    person: bool = False,
) -> Promotion:
    """Make the judged version `champion` and the champion before it `previous`.

    Idempotent by `run_id`. Raises GateClosed if the verdict is no pass or the version was rolled back (unless a
    `person` says so), Conflict if the champion is no longer the one that the verdict was made against.
    """
    with store.writing() as connection:
        return promote_within(connection, verdict, by_whom=by_whom, run_id=run_id, reason=reason, person=person)


def promote_within(
    connection: Connection,
    verdict: Verdict,
    *,
    by_whom: str,
    run_id: str | None = None,
    reason: str = "",
    person: bool = False,
    cause: str | None = None,
) -> Promotion:
    """The same in a transaction of the caller's, who can go on in it if this raises. `cause` is an event's `ref`."""
    model, version = verdict.model, verdict.version
    done = _promotion_of_run(connection, run_id)
    if done is not None:
        return done
    champion = may_promote(connection, verdict, person=person)
    move = Promotion(0, model, version, champion, "promote", run_id, verdict.id, by_whom, reason, time.time())
    return _move(connection, move, cause or by_run(run_id))


def may_promote(connection: Connection, verdict: Verdict, *, person: bool = False) -> int | None:
    """The champion that the judged version may replace. Raises GateClosed and Conflict as `promote` does."""
    model, version = verdict.model, verdict.version
    if verdict.outcome != "pass" and not person:
        raise GateClosed(f"{model}@{version} has no passing verdict ({verdict.outcome})", fix=_judge_again(verdict))
    row = connection.execute(
        "SELECT rolled_back, pruned FROM versions WHERE model = ? AND version = ?", (model, version)
    ).fetchone()
    refuse_pruned(model, version, row["pruned"])
    if row["rolled_back"] and not person:
        raise GateClosed(f"{model}@{version} was rolled back", fix=f"a person may: `ft promote {model}@{version}`")
    champion = _alias(connection, model, "champion")
    if champion == version:
        raise Conflict(f"{model}@{version} is the champion already")
    if champion != verdict.body.get("champion") and not person:
        raise Conflict(
            f"{model}@{version} was judged against {_named(verdict.body.get('champion'))}, "
            f"and the champion is {_named(champion)} now",
            fix=_judge_again(verdict),
        )
    _refuse_during_rollout(connection, model)
    return champion


def roll_back(
    store: Store, model: str, *, by_whom: str, reason: str = "", to: int | None = None, cause: str | None = None
) -> Promotion:
    """Make `previous` (or version `to`) champion again. What it replaces is not promoted again without a person.

    `cause` is the event that led to it, None where a person does it.
    """
    with store.writing() as connection:
        return roll_back_within(connection, model, by_whom=by_whom, reason=reason, to=to, cause=cause)


def roll_back_within(
    connection: Connection,
    model: str,
    *,
    by_whom: str,
    reason: str = "",
    to: int | None = None,
    cause: str | None = None,
) -> Promotion:
    """The same in a transaction of the caller's."""
    champion = _alias(connection, model, "champion")
    target = to if to is not None else _alias(connection, model, "previous")
    if champion is None or target is None:
        raise NotFound(
            f"{model} has no previous version to go back to",
            fix=f"`ft models {model}` lists its versions",
        )
    if target == champion:
        raise Conflict(f"{model}@{target} is the champion already")
    _refuse_during_rollout(connection, model)
    row = connection.execute("SELECT pruned FROM versions WHERE model = ? AND version = ?", (model, target)).fetchone()
    if row is None:
        raise NotFound(f"no version {model}@{target}", fix=f"`ft models {model}` lists them")
    refuse_pruned(model, target, row["pruned"])
    connection.execute("UPDATE versions SET rolled_back = 1 WHERE model = ? AND version = ?", (model, champion))
    move = Promotion(0, model, target, champion, "rollback", None, None, by_whom, reason, time.time())
    return _move(connection, move, cause)


def base_of(connection: Connection, model: str, version: int) -> str | None:
    """Digest of the base model that a version is on."""
    row = connection.execute("SELECT body FROM versions WHERE model = ? AND version = ?", (model, version)).fetchone()
    digest = json.loads(row["body"]).get("base_digest") or json.loads(row["body"]).get("base", {}).get("digest")
    return None if digest is None else str(digest)


def promotions(store: Store, model: str = "") -> list[Promotion]:
    rows = store.read("SELECT * FROM promotions WHERE ? IN ('', model) ORDER BY id", (model,))
    return [Promotion(**row) for row in rows]


def unprojected_aliases(store: Store) -> list[tuple[str, str, int]]:
    """(model, alias, version) that MLflow has not been told of yet."""
    rows = store.read("SELECT model, alias, version FROM aliases WHERE projected IS DISTINCT FROM version")
    return [(row["model"], row["alias"], row["version"]) for row in rows]


def unprojected_verdicts(store: Store, model: str = "") -> list[Verdict]:
    """Verdicts that MLflow has not been told of yet, the oldest first."""
    rows = store.read("SELECT * FROM verdicts WHERE ? IN ('', model) AND projected = 0 ORDER BY id", (model,))
    return [verdict_of(row) for row in rows]


def mark_verdict_projected(store: Store, verdict: int) -> None:
    with store.writing() as connection:
        connection.execute("UPDATE verdicts SET projected = 1 WHERE id = ?", (verdict,))


def _move(connection: Connection, move: Promotion, cause: str | None) -> Promotion:
    """Write the row, set both aliases and append the event; the row as it was written."""
    values = {name: value for name, value in asdict(move).items() if name != "id"}
    done = connection.execute(
        f"INSERT INTO promotions ({', '.join(values)}) VALUES ({', '.join('?' * len(values))}) RETURNING id",
        tuple(values.values()),
    )
    number = int(done.fetchone()["id"])
    _set_alias(connection, move.model, "champion", move.version)
    if move.from_version is not None:
        _set_alias(connection, move.model, "previous", move.from_version)
    type_ = "adapter.promoted" if move.kind == "promote" else "adapter.rolled_back"
    data = {"from": move.from_version, "by": move.by_whom, "reason": move.reason, "run": move.run_id}
    event = new_event("ft/adapters", type_, f"{move.model}@{move.version}", data, key=str(number),
                      cause=cause)  # fmt: skip
    append_within(connection, event)
    return replace(move, id=number)


def _refuse_during_rollout(connection: Connection, model: str) -> None:
    """While a version is on its way by steps, its rollout alone moves `champion`."""
    row = connection.execute("SELECT version FROM rollouts WHERE model = ? AND state = 'running'", (model,)).fetchone()
    if row is not None:
        raise Conflict(f"a rollout of {model}@{row['version']} is under way",
                       fix=f"`ft rollout {model}` shows it; `ft rollout cancel {model}` ends it")  # fmt: skip


def _promotion_of_run(connection: Connection, run_id: str | None) -> Promotion | None:
    row = connection.execute("SELECT * FROM promotions WHERE run_id = ?", (run_id,)).fetchone() if run_id else None
    return Promotion(**dict(row)) if row else None


def _alias(connection: Connection, model: str, alias: str) -> int | None:
    row = connection.execute("SELECT version FROM aliases WHERE model = ? AND alias = ?", (model, alias)).fetchone()
    return int(row["version"]) if row else None


def _set_alias(connection: Connection, model: str, alias: str, version: int) -> None:
    connection.execute(
        "INSERT INTO aliases (model, alias, version, changed) VALUES (?,?,?,?) "
        "ON CONFLICT (model, alias) DO UPDATE SET version = excluded.version, changed = excluded.changed",
        (model, alias, version, time.time()),
    )


def _version(row: dict[str, Any]) -> Version:
    return Version(**{**row, "body": json.loads(row["body"]), "rolled_back": bool(row["rolled_back"])})


def _named(version: object) -> str:
    return "none" if version is None else f"version {version}"


def verdict_of(row: Any) -> Verdict:
    """Of a row of `verdicts`."""
    known = {name: value for name, value in dict(row).items() if name != "projected"}
    return Verdict(**{**known, "body": json.loads(row["body"])})


def _judge_again(verdict: Verdict) -> str:
    return f"judge it again with `ft gate {verdict.model}@{verdict.version}`"

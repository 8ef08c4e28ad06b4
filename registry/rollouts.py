"""Canary rollouts, as rows: which version is on its way to `champion`, how far it is, what was seen of it so far.

One at a time of each model. Every change is a compare-and-set on the rollout's step, so whoever decides late, or twice,
or beside another server, changes nothing. `champion` moves in the transaction that ends the last step.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from typing import Any

from registry.adapters import Verdict, base_of, may_promote, promote_within, verdict_of
from registry.alias_requests import note_refusal_within
from registry.errors import Conflict, GateClosed, NotFound
from registry.events import append_within, by_run, new_event
from registry.rollout_terms import Rollout as Terms
from registry.store import Connection, Store, dump

SOURCE = "ft/rollouts"


@dataclass(frozen=True)
class Rollout:
    """`held`: seconds that the step has been in force on a server. `counts`: what was seen in it, of each arm."""

    id: int
    model: str
    version: int
    from_version: int
    verdict: int
    terms: Terms
    step: int
    step_since: float
    held: float
    counts: dict[str, Any]
    state: str
    reason: str
    by_whom: str
    person: bool
    run_id: str | None
    created: float
    ended: float | None

    @property
    def name(self) -> str:
        return f"{self.model}@{self.version}"

    @property
    def stable(self) -> str:
        return f"{self.model}@{self.from_version}"

    @property
    def percent(self) -> float:
        return self.terms.steps[self.step].percent

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "terms": self.terms.model_dump(mode="json", by_alias=True)}


def start(
    store: Store, verdict: Verdict, terms: Terms, *, by_whom: str, run_id: str | None = None, reason: str = "",
    person: bool = False,
) -> Rollout:  # fmt: skip
    """Begin with the judged version beside the champion; what a promotion may not do, a rollout may not begin.

    Idempotent by `run_id`. Raises GateClosed and Conflict as `adapters.promote` does; Conflict without a champion, and
    beside another rollout of the model.
    """
    with store.writing() as connection:
        row = connection.execute("SELECT * FROM rollouts WHERE run_id = ?", (run_id,)).fetchone() if run_id else None
        if row is None:
            champion = may_promote(connection, verdict, person=person)
            _refuse_two_bases(connection, verdict, champion)
            body, now = dump(terms.model_dump(mode="json", by_alias=True)), time.time()
            row = _insert(connection, {
                "model": verdict.model, "version": verdict.version, "from_version": champion, "verdict": verdict.id,
                "terms": body, "step": 0, "step_since": now, "state": "running", "reason": reason, "by_whom": by_whom,
                "person": int(person), "run_id": run_id, "created": now,
            })  # fmt: skip
            data = {"from": champion, "percent": terms.steps[0].percent, "steps": len(terms.steps), "by": by_whom}
            _tell(connection, _rollout(row), "started", data, cause=by_run(run_id))
        return _rollout(row)


def running(store: Store, model: str = "") -> list[Rollout]:
    rows = store.read("SELECT * FROM rollouts WHERE state = 'running' AND ? IN ('', model) ORDER BY id", (model,))
    return [_rollout(row) for row in rows]


def rollouts(store: Store, model: str = "") -> list[Rollout]:
    """All of them, also the ended ones, the oldest first."""
    rows = store.read("SELECT * FROM rollouts WHERE ? IN ('', model) ORDER BY id", (model,))
    return [_rollout(row) for row in rows]


def get(store: Store, id_: int) -> Rollout:
    row = store.first("SELECT * FROM rollouts WHERE id = ?", (id_,))
    if row is None:
        raise NotFound(f"no rollout {id_}", fix="`ft rollout` lists them")
    return _rollout(row)


def running_of(store: Store, model: str) -> Rollout:
    """Raises NotFound if none is under way."""
    found = running(store, model)
    if not found:
        raise NotFound(f"no rollout of {model} is under way", fix=f"`ft rollout {model}` shows those that have ended")
    return found[0]


def add_seen(store: Store, rollout: Rollout, seconds: float, counts: dict[str, Any]) -> None:
    """Add to what the step has seen (see `merged_counts`), and `seconds` in force; nothing if it is over.

    Several servers may say so of the same time: between two calls no more is added than has passed. One that only
    counts says 0 seconds.
    """
    with store.writing() as connection:
        row = connection.execute("SELECT * FROM rollouts WHERE id = ?", (rollout.id,)).fetchone()
        if row is None or (row["state"], row["step"]) != ("running", rollout.step):
            return
        now = time.time()
        passed = max(0.0, now - row["ticked"]) if row["ticked"] is not None else seconds
        ticked = now if seconds else row["ticked"]
        connection.execute(
            "UPDATE rollouts SET held = held + ?, ticked = ?, counts = ? WHERE id = ?",
            (min(seconds, passed), ticked, dump(merged_counts(json.loads(row["counts"]), counts)), rollout.id),
        )


def rated(store: Store, name: str, since: float) -> dict[str, Any]:
    """`count` and `mean` of the ratings that a version was given since then."""
    row = store.first(
        "SELECT count(rating) AS count, avg(rating) AS mean FROM events "
        "WHERE type = 'feedback.received' AND subject = ? AND time >= ?", (name, since),
    )  # fmt: skip
    return {"count": row["count"], "mean": row["mean"] or 0.0} if row else {"count": 0, "mean": 0.0}


def merged_counts(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Pure. Nested dicts of numbers, added."""
    found = dict(one)
    for name, value in other.items():
        found[name] = (
            merged_counts(found.get(name, {}), value) if isinstance(value, dict) else found.get(name, 0) + value
        )
    return found


def note_held(store: Store, rollout: Rollout, reason: str) -> None:
    """The step's time is over, and it cannot go on yet: said once for each step."""
    with store.writing() as connection:
        if _is_current(connection, rollout):
            connection.execute("UPDATE rollouts SET reason = ? WHERE id = ?", (reason, rollout.id))
            data = {"percent": rollout.percent, "reason": reason}
            _tell(connection, rollout, "held", data, key=f"{rollout.id}-held-{rollout.step}")


def advance(store: Store, rollout: Rollout, *, by_whom: str = "ft", reason: str = "") -> Rollout:
    """On to the next step, or after the last one `champion` moves. Nothing happens if it is not at that step any more.

    Ends as `cancelled`, with the reason, if the version may not become champion any more.
    """
    with store.writing() as connection:
        if not _is_current(connection, rollout):
            pass
        elif rollout.step + 1 < len(rollout.terms.steps):
            connection.execute(
                "UPDATE rollouts SET step = step + 1, step_since = ?, held = 0, ticked = NULL, counts = '{}', "
                "reason = ? WHERE id = ?", (time.time(), reason, rollout.id),
            )  # fmt: skip
            percent = rollout.terms.steps[rollout.step + 1].percent
            _tell(connection, rollout, "advanced", {"percent": percent, "by": by_whom, "reason": reason},
                  key=f"{rollout.id}-step-{rollout.step + 1}")  # fmt: skip
        else:
            _finish(connection, rollout, by_whom, reason)
    return get(store, rollout.id)


def roll_back(store: Store, rollout: Rollout, reason: str, numbers: dict[str, Any] | None = None) -> Rollout:
    """The champion answers everybody again, and the version is not promoted again without a person."""
    with store.writing() as connection:
        if _is_current(connection, rollout):
            key = (rollout.model, rollout.version)
            connection.execute("UPDATE versions SET rolled_back = 1 WHERE model = ? AND version = ?", key)
            note_refusal_within(connection, *key, f"rolled back from {rollout.percent:g}%: {reason}")
            _end(connection, rollout, "rolled_back", reason, {"percent": rollout.percent, "numbers": numbers or {}})
    return get(store, rollout.id)


def cancel(store: Store, rollout: Rollout, *, by_whom: str, reason: str = "") -> Rollout:
    """The champion answers everybody again; the version may be promoted again."""
    with store.writing() as connection:
        row = connection.execute("SELECT state FROM rollouts WHERE id = ?", (rollout.id,)).fetchone()
        if row["state"] == "running":
            _end(connection, rollout, "cancelled", reason or f"by {by_whom}", {"by": by_whom})
    return get(store, rollout.id)


def _finish(connection: Connection, rollout: Rollout, by_whom: str, reason: str) -> None:
    row = connection.execute("SELECT * FROM verdicts WHERE id = ?", (rollout.verdict,)).fetchone()
    # Ended first: beside a running rollout nothing is promoted.
    connection.execute("UPDATE rollouts SET state = 'done' WHERE id = ?", (rollout.id,))
    try:
        promote_within(
            connection, verdict_of(row), by_whom=rollout.by_whom, run_id=rollout.run_id, person=rollout.person,
            reason=reason or "its rollout has held", cause=f"{SOURCE} {rollout.id}-end",
        )  # fmt: skip
    except (GateClosed, Conflict, NotFound) as error:
        _end(connection, rollout, "cancelled", error.what, {"by": by_whom})
    else:
        _end(connection, rollout, "done", reason, {"from": rollout.from_version, "by": by_whom})


def _end(connection: Connection, rollout: Rollout, state: str, reason: str, data: dict[str, Any]) -> None:
    connection.execute(
        "UPDATE rollouts SET state = ?, reason = ?, ended = ? WHERE id = ?", (state, reason, time.time(), rollout.id)
    )
    name = "finished" if state == "done" else state
    _tell(connection, rollout, name, {**data, "reason": reason}, key=f"{rollout.id}-end")


def _is_current(connection: Connection, rollout: Rollout) -> bool:
    row = connection.execute("SELECT state, step FROM rollouts WHERE id = ?", (rollout.id,)).fetchone()
    return row is not None and (row["state"], row["step"]) == ("running", rollout.step)


def _refuse_two_bases(connection: Connection, verdict: Verdict, champion: int | None) -> None:
    name = f"{verdict.model}@{verdict.version}"
    if champion is None:
        raise Conflict(f"{verdict.model} has no champion that {name} could answer beside",
                       fix=f"promote it to all callers: `ft promote {name}`")  # fmt: skip
    here, there = (base_of(connection, verdict.model, each) for each in (verdict.version, champion))
    if here != there:
        raise Conflict(f"{name} is on another base model than the champion, version {champion}: one engine cannot "
                       "answer with both", fix=f"promote it to all callers: `ft promote {name}`")  # fmt: skip


def _insert(connection: Connection, values: dict[str, Any]) -> Any:
    return connection.execute(
        f"INSERT INTO rollouts ({', '.join(values)}) VALUES ({', '.join('?' * len(values))}) RETURNING *",
        tuple(values.values()),
    ).fetchone()


def _tell(
    connection: Connection,
    rollout: Rollout,
    what: str,
    data: dict[str, Any],
    *,
    key: str = "",
    cause: str | None = None,
) -> None:
    """Append the event. Each has the first as its cause."""
    began = f"{rollout.id}-started"
    key = key or f"{rollout.id}-{what}"
    event = new_event(SOURCE, f"rollout.{what}", rollout.name, data, key=key,
                      cause=cause if key == began else f"{SOURCE} {began}")  # fmt: skip
    append_within(connection, event)


def _rollout(row: Any) -> Rollout:
    found = {name: value for name, value in dict(row).items() if name != "ticked"}
    terms, counts = Terms.model_validate(json.loads(found["terms"])), json.loads(found["counts"])
    return Rollout(**{**found, "terms": terms, "counts": counts, "person": bool(found["person"])})

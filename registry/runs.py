"""Run rows: what a person asked for, how far it has come, and how it ended.

The row is written first and is the truth of what is wanted. The worker makes DBOS agree with it
(`jobs/runtime.py`), so the CLI needs no durable engine to submit, cancel or look.
"""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from registry.errors import Conflict, FtError, NotFound
from registry.events import RUNS, append_within, by_run, new_event
from registry.store import Connection, Store, dump

State = Literal["submitted", "running", "paused", "succeeded", "refused", "failed", "cancelled"]
ACTIVE = ("submitted", "running")
ON = (*ACTIVE, "paused")
MANY = 100
# Wishes that end what is at work.
STOPS = ("cancel", "pause")


@dataclass(frozen=True)
class Run:
    """One durable execution of a recipe.

    State `refused` means that the gate (or a person) did not let its version through; `told` is the end that MLflow was
    told of; `paused` since when it stands still: a paused run is not active, but on, so later runs of its recipe wait;
    `pruned` is when its job folder was deleted.
    """

    id: str
    recipe: str
    model: str
    digest: str
    recipe_path: str
    body: dict[str, Any]
    state: State
    stage: str
    wish: str | None
    created: float
    started: float | None
    finished: float | None
    error: dict[str, Any] | None
    result: dict[str, Any]
    told: str | None
    paused: float | None
    pruned: float | None = None

    @property
    def active(self) -> bool:
        return self.state in ACTIVE

    @property
    def ended(self) -> bool:
        return self.state not in (*ACTIVE, "paused")


@dataclass(frozen=True)
class Step:
    """One attempt at one step of a run; `kind` is 'platform' or the outside work it waited for."""

    name: str
    attempt: int
    started: float
    finished: float | None
    kind: str
    note: dict[str, Any]


def submit(store: Store, recipe: dict[str, Any], recipe_path: str, digest: str, *, queue: bool = False) -> Run:
    """Write the row of a new run. Raises Conflict while another run of the recipe is on, unless `queue`."""
    name, run_id = str(recipe["name"]), f"{recipe['name']}-{secrets.token_hex(5)}"
    with store.writing() as connection:
        on = connection.execute(
            "SELECT id, state FROM runs WHERE recipe = ? AND state IN ('submitted', 'running', 'paused') "
            "ORDER BY created LIMIT 1",
            (name,),
        ).fetchone()
        if on and not queue:
            raise _is_on(on["id"], on["state"], name, recipe_path)
        submit_within(connection, run_id, recipe, recipe_path, digest)
    return get(store, run_id)


def submit_within(
    connection: Connection,
    run_id: str,
    recipe: dict[str, Any],
    recipe_path: str,
    digest: str,
    cause: str | None = None,
) -> None:
    """Write the row in a transaction of the caller's. Nothing happens if there is a run of that id."""
    now = time.time()  # under the lock, so that the order of `created` is the order in which runs are seen
    done = connection.execute(
        "INSERT INTO runs (id, recipe, model, digest, recipe_path, body, state, created) "
        "VALUES (?,?,?,?,?,?,'submitted',?) ON CONFLICT DO NOTHING",
        (run_id, recipe["name"], recipe["model"], digest, recipe_path, dump(recipe), now),
    )
    if done.rowcount:
        data = {"recipe": recipe["name"]}
        append_within(connection, new_event(RUNS, "run.submitted", run_id, data, key=run_id, cause=cause))


def get(store: Store, run_id: str) -> Run:
    """The run of that id, or of the one id that begins so. Raises NotFound."""
    rows = store.read("SELECT * FROM runs WHERE id = ?", (run_id,)) or _beginning_with(store, run_id)
    if len(rows) == 1:
        return _run(rows[0])
    if rows:
        what = f"'{run_id}' is the beginning of {'many' if len(rows) == MANY else len(rows)} runs"
        raise NotFound(what, fix="`ft runs` lists them")
    _refuse_pruned(store, run_id)
    raise NotFound(f"no run '{run_id}'", fix="`ft runs` lists them")


def listed(store: Store, *, limit: int = 20, active: bool = False, on: bool = False, recipe: str = "") -> list[Run]:
    """Runs, the newest first: all, those that are `active`, or those that are `on` (active or paused)."""
    # Only the conditions that are given: with one for each case in the statement no index would be used.
    states = ACTIVE if active else ON if on else ()
    given = [*([f"state IN {states}"] if states else []), *(["recipe = ?"] if recipe else [])]
    where = f"WHERE {' AND '.join(given)} " if given else ""
    values = (*([recipe] if recipe else []), limit)
    return [_run(row) for row in store.read(f"SELECT * FROM runs {where}ORDER BY created DESC LIMIT ?", values)]


def earlier_active(store: Store, run: Run) -> list[str]:
    """Runs of the same recipe that this one waits behind."""
    rows = store.read(
        "SELECT id FROM runs WHERE recipe = ? AND state IN ('submitted', 'running', 'paused') "
        "AND (created, id) < (?, ?) ORDER BY created",
        (run.recipe, run.created, run.id),
    )
    return [row["id"] for row in rows]


def set_wish(store: Store, run_id: str, wish: str) -> None:
    """Write down what a person wants of a run ('cancel', 'pause' or 'resume'); a worker acts on it."""
    with store.writing() as connection:
        set_wish_within(connection, run_id, wish)


def set_wish_within(connection: Connection, run_id: str, wish: str) -> None:
    """The same in a transaction of the caller's. A run that has ended meanwhile can be neither cancelled nor paused.

    Of a paused run nothing is at work, so it is cancelled at once. Who pauses does not undo a cancel.
    """
    if wish == "cancel":
        _end(connection, run_id, "cancelled", "'paused'")
    connection.execute(
        "UPDATE runs SET wish = ? WHERE id = ? AND (? NOT IN ('cancel', 'pause') OR state IN ('submitted', 'running')) "
        "AND NOT (? = 'pause' AND wish IS NOT DISTINCT FROM 'cancel')",
        (wish, run_id, wish, wish),
    )


def clear_wish(store: Store, run_id: str, wish: str) -> None:
    with store.writing() as connection:
        connection.execute("UPDATE runs SET wish = NULL WHERE id = ? AND wish = ?", (run_id, wish))


def set_stage(store: Store, run_id: str, stage: str) -> None:
    """The run is on and at `stage`; a run that has ended stays ended, and a paused one paused."""
    if store.first("SELECT 1 AS same FROM runs WHERE id = ? AND stage = ? AND state = 'running'", (run_id, stage)):
        return  # said again several times a second: a write each time would wake everybody who waits for changes
    with store.writing() as connection:
        _set_stage_within(connection, run_id, stage)


def note_result(store: Store, run_id: str, **facts: Any) -> None:
    """Add facts (version, verdict, scores...) to what the run has to show."""
    with store.writing() as connection:
        row = connection.execute("SELECT result FROM runs WHERE id = ?", (run_id,)).fetchone()
        merged = {**json.loads(row["result"] or "{}"), **facts}
        connection.execute("UPDATE runs SET result = ? WHERE id = ?", (dump(merged), run_id))


def finish(store: Store, run_id: str, state: State, error: FtError | None = None) -> None:
    """End the run, once; `reopen` undoes it."""
    with store.writing() as connection:
        _end(connection, run_id, state, "'submitted', 'running'", error)


def stopped(store: Store, run: Run) -> None:
    """Nothing is at work any more for a run that was to be cancelled or paused: now it is."""
    if run.wish == "pause":
        _pause(store, run.id)
    else:
        finish(store, run.id, "cancelled")


def reopen(store: Store, run_id: str) -> None:
    """A failed, cancelled or paused run goes on (`ft resume`). How long it lay stopped is added up in its result.

    Who is to approve its version gets that time too.
    """
    with store.writing() as connection:
        row = connection.execute("SELECT state, finished, paused, result FROM runs WHERE id = ?", (run_id,)).fetchone()
        lay = _lay_still(row["finished"] if row["finished"] is not None else row["paused"])
        connection.execute(
            "UPDATE runs SET state = 'running', finished = NULL, paused = NULL, error = NULL, told = NULL, result = ? "
            "WHERE id = ?",
            (_with_stop(row["result"], lay), run_id),
        )
        connection.execute(
            "UPDATE approvals SET deadline = deadline + ? WHERE run_id = ? AND answer IS NULL", (lay, run_id)
        )
        if row["state"] not in ACTIVE:
            _append(connection, run_id, "run.resumed", {"from": row["state"]})


def untold(store: Store) -> list[Run]:
    """Failed and cancelled runs whose end MLflow was not told of yet."""
    rows = store.read("SELECT * FROM runs WHERE state IN ('failed', 'cancelled') AND told IS DISTINCT FROM state")
    return [_run(row) for row in rows]


def mark_told(store: Store, run: Run) -> None:
    with store.writing() as connection:
        connection.execute("UPDATE runs SET told = ? WHERE id = ? AND state = ?", (run.state, run.id, run.state))


def begin_step(store: Store, run_id: str, name: str, kind: str) -> int:
    """Write down that a step starts, which is the run's stage now; the attempt's number, 1 for the first."""
    with store.writing() as connection:
        row = connection.execute(
            "INSERT INTO steps (run_id, name, attempt, started, kind) SELECT ?, ?, coalesce(max(attempt), 0) + 1, ?, ? "
            "FROM steps WHERE run_id = ? AND name = ? RETURNING attempt",
            (run_id, name, time.time(), kind, run_id, name),
        ).fetchone()
        _set_stage_within(connection, run_id, name)
        return int(row["attempt"])


def end_step(store: Store, run_id: str, name: str, attempt: int, note: dict[str, Any] | None = None) -> None:
    """Write down that the attempt is over, once: well, unless the note has an `error`."""
    now, note = time.time(), note or {}
    with store.writing() as connection:
        done = connection.execute(
            "UPDATE steps SET finished = ?, note = ? WHERE run_id = ? AND name = ? AND attempt = ? "
            "AND finished IS NULL RETURNING started",
            (now, dump(note), run_id, name, attempt),
        ).fetchone()
        if done and "error" not in note:
            data = {"step": name, "attempt": attempt, "seconds": round(max(0.0, now - done["started"]), 3)}
            _append(connection, run_id, "run.step", data, key=f"{run_id}/{name}/{attempt}")


def steps(store: Store, run_id: str) -> list[Step]:
    rows = store.read(
        "SELECT name, attempt, started, finished, kind, note FROM steps WHERE run_id = ? ORDER BY started",
        (run_id,),
    )
    return [Step(**{**row, "note": json.loads(row["note"] or "{}")}) for row in rows]


def _end(connection: Connection, run_id: str, state: State, among: str, error: FtError | None = None) -> None:
    """End a run that is in one of the states `among` (SQL), and say so."""
    row = connection.execute(
        f"SELECT paused, result FROM runs WHERE id = ? AND state IN ({among})", (run_id,)
    ).fetchone()
    if row is None:
        return
    connection.execute(
        "UPDATE runs SET state = ?, finished = ?, error = ?, wish = NULL, paused = NULL, result = ? WHERE id = ?",
        (state, time.time(), dump(error.as_dict()) if error else None,
         _with_stop(row["result"], _lay_still(row["paused"])), run_id),
    )  # fmt: skip
    _append(connection, run_id, f"run.{_event(state)}", {"state": state, **(error.as_dict() if error else {})})


def _pause(store: Store, run_id: str) -> None:
    with store.writing() as connection:
        done = connection.execute(
            "UPDATE runs SET state = 'paused', paused = ?, wish = NULL "
            "WHERE id = ? AND state IN ('submitted', 'running') AND wish = 'pause' RETURNING stage",
            (time.time(), run_id),
        ).fetchone()
        if done:
            _append(connection, run_id, "run.paused", {"stage": done["stage"]})


def _append(connection: Connection, run_id: str, type_: str, data: dict[str, Any], key: str = "") -> None:
    append_within(connection, new_event(RUNS, type_, run_id, data, key=key, cause=by_run(run_id)))


def _lay_still(since: float | None) -> float:
    """Seconds; a clock that was put back meanwhile makes them none."""
    return max(0.0, time.time() - since) if since is not None else 0.0


def _with_stop(result: str | None, seconds: float) -> str:
    """The run's result with so many seconds more in which it was stopped."""
    facts = json.loads(result or "{}")
    return dump({**facts, "stopped": facts.get("stopped", 0.0) + seconds} if seconds else facts)


def _is_on(run_id: str, state: str, recipe: str, place: str) -> Conflict:
    if state == "paused":
        what, first = "is paused", f"let it go on with `ft resume {run_id}`"
    else:
        what, first = "is on already", f"watch it with `ft logs -f {run_id}`"
    return Conflict(
        f"a run of recipe '{recipe}' {what}: {run_id}",
        place=place,
        fix=f"{first}, stop it with `ft cancel {run_id}`, or wait behind it with `ft run --queue`",
    )


def _beginning_with(store: Store, beginning: str) -> list[dict[str, Any]]:
    """Ids are ASCII, so all that begin so lie between it and the same with the highest character behind it."""
    if not beginning:
        return []
    return store.read(
        "SELECT * FROM runs WHERE id >= ? AND id < ? ORDER BY id LIMIT ?", (beginning, f"{beginning}\U0010ffff", MANY)
    )


def _refuse_pruned(store: Store, run_id: str) -> None:
    row = store.first("SELECT * FROM pruned_runs WHERE id = ?", (run_id,))
    if row:
        when = datetime.fromtimestamp(row["pruned"]).strftime("%Y-%m-%d")
        raise NotFound(
            f"run {run_id} ({row['state']}) was pruned on {when}", fix=f"`ft events why {run_id}` tells of it"
        )


def _set_stage_within(connection: Connection, run_id: str, stage: str) -> None:
    done = connection.execute(
        "UPDATE runs SET state = 'running', stage = ? WHERE id = ? AND state IN ('submitted', 'running') "
        "RETURNING recipe, started",
        (stage, run_id),
    ).fetchone()
    if done and done["started"] is None:
        connection.execute("UPDATE runs SET started = ? WHERE id = ?", (time.time(), run_id))
        _append(connection, run_id, "run.started", {"recipe": done["recipe"]}, key=f"{run_id}/started")


def _run(row: dict[str, Any]) -> Run:
    body, error = json.loads(row["body"]), json.loads(row["error"]) if row["error"] else None
    return Run(**{**row, "body": body, "error": error, "result": json.loads(row["result"] or "{}")})


def _event(state: str) -> str:
    return "finished" if state in ("succeeded", "refused") else state

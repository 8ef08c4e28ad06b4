"""Run rows: what a person asked for, how far it has come, and how it ended.

The row is written first and is the truth of what is wanted. The worker makes DBOS agree with it
(`jobs/runtime.py`), so the CLI needs no durable engine to submit, cancel or look.
"""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass
from typing import Any, Literal

from registry.errors import Conflict, FtError, NotFound
from registry.events import RUNS, append_within, by_run, new_event
from registry.store import Connection, Store, dump

State = Literal["submitted", "running", "succeeded", "refused", "failed", "cancelled"]
ACTIVE = ("submitted", "running")


@dataclass(frozen=True)
class Run:
    """One durable execution of a recipe.

    State `refused` means that the gate did not let its version through; `told` is the end that MLflow was told of.
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

    @property
    def active(self) -> bool:
        return self.state in ACTIVE


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
            "SELECT id FROM runs WHERE recipe = ? AND state IN ('submitted', 'running')", (name,)
        ).fetchone()
        if on and not queue:
            raise Conflict(
                f"a run of recipe '{name}' is on already: {on['id']}",
                place=recipe_path,
                fix=f"watch it with `ft logs -f {on['id']}`, stop it with `ft cancel {on['id']}`, "
                "or wait behind it with `ft run --queue`",
            )
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
    rows = store.read("SELECT * FROM runs WHERE id = ?", (run_id,)) or store.read(
        "SELECT * FROM runs WHERE substr(id, 1, ?) = ?", (len(run_id), run_id)
    )
    if len(rows) == 1:
        return _run(rows[0])
    what = f"no run '{run_id}'" if not rows else f"'{run_id}' is the beginning of {len(rows)} runs"
    raise NotFound(what, fix="`ft runs` lists them")


def listed(store: Store, *, limit: int = 20, active: bool = False, recipe: str = "") -> list[Run]:
    """Runs, the newest first."""
    rows = store.read(
        "SELECT * FROM runs WHERE (? = 0 OR state IN ('submitted', 'running')) AND (? = '' OR recipe = ?) "
        "ORDER BY created DESC LIMIT ?",
        (int(active), recipe, recipe, limit),
    )
    return [_run(row) for row in rows]


def earlier_active(store: Store, run: Run) -> list[str]:
    """Runs of the same recipe that this one waits behind."""
    rows = store.read(
        "SELECT id FROM runs WHERE recipe = ? AND state IN ('submitted', 'running') "
        "AND (created, id) < (?, ?) ORDER BY created",
        (run.recipe, run.created, run.id),
    )
    return [row["id"] for row in rows]


def set_wish(store: Store, run_id: str, wish: str) -> None:
    """Write down what a person wants of a run ('cancel' or 'resume'); a worker acts on it."""
    with store.writing() as connection:
        set_wish_within(connection, run_id, wish)


def set_wish_within(connection: Connection, run_id: str, wish: str) -> None:
    """The same in a transaction of the caller's. A run that has ended meanwhile cannot be cancelled any more."""
    connection.execute(
        "UPDATE runs SET wish = ? WHERE id = ? AND (? != 'cancel' OR state IN ('submitted', 'running'))",
        (wish, run_id, wish),
    )


def clear_wish(store: Store, run_id: str, wish: str) -> None:
    with store.writing() as connection:
        connection.execute("UPDATE runs SET wish = NULL WHERE id = ? AND wish = ?", (run_id, wish))


def set_stage(store: Store, run_id: str, stage: str) -> None:
    """The run is on and at `stage`; a run that has ended stays ended."""
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
        done = connection.execute(
            "UPDATE runs SET state = ?, finished = ?, error = ?, wish = NULL "
            "WHERE id = ? AND state IN ('submitted', 'running')",
            (state, time.time(), dump(error.as_dict()) if error else None, run_id),
        )
        if done.rowcount:
            data = {"state": state, **(error.as_dict() if error else {})}
            append_within(connection, new_event(RUNS, f"run.{_event(state)}", run_id, data, cause=by_run(run_id)))


def reopen(store: Store, run_id: str) -> None:
    """A failed or cancelled run goes on (`ft resume`). How long it lay stopped is added up in its result."""
    with store.writing() as connection:
        row = connection.execute("SELECT finished, result FROM runs WHERE id = ?", (run_id,)).fetchone()
        result = json.loads(row["result"] or "{}")
        if row["finished"] is not None:
            result["stopped"] = result.get("stopped", 0.0) + time.time() - row["finished"]
        connection.execute(
            "UPDATE runs SET state = 'running', finished = NULL, error = NULL, told = NULL, result = ? WHERE id = ?",
            (dump(result), run_id),
        )


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
    store.note(
        "UPDATE steps SET finished = ?, note = ? WHERE run_id = ? AND name = ? AND attempt = ?",
        (time.time(), dump(note or {}), run_id, name, attempt),
    )


def steps(store: Store, run_id: str) -> list[Step]:
    rows = store.read(
        "SELECT name, attempt, started, finished, kind, note FROM steps WHERE run_id = ? ORDER BY started",
        (run_id,),
    )
    return [Step(**{**row, "note": json.loads(row["note"] or "{}")}) for row in rows]


def _set_stage_within(connection: Connection, run_id: str, stage: str) -> None:
    connection.execute(
        "UPDATE runs SET state = 'running', stage = ?, started = coalesce(started, ?) "
        "WHERE id = ? AND state IN ('submitted', 'running')",
        (stage, time.time(), run_id),
    )


def _run(row: dict[str, Any]) -> Run:
    body, error = json.loads(row["body"]), json.loads(row["error"]) if row["error"] else None
    return Run(**{**row, "body": body, "error": error, "result": json.loads(row["result"] or "{}")})


def _event(state: str) -> str:
    return "finished" if state in ("succeeded", "refused") else state

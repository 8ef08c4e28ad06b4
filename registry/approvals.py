"""Approvals: a person is asked whether a judged version may be promoted, and the first answer counts.

A row is of one verdict: judged again against another champion, the version is asked for again. The deadline is a time
of day in the store, so it outlives workers; a clock that jumps under a living worker takes it along (`move_deadline`).
Of the same verdict a person may also be asked whether another recipe may be started (`Approval.starts`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from registry.errors import Conflict, NotFound
from registry.events import RUNS, append_within, by_run, new_event
from registry.store import Connection, Store

Answer = Literal["approved", "rejected", "timed_out"]
EVENTS = {"approved": "run.approved", "rejected": "run.rejected", "timed_out": "run.approval_timed_out"}


@dataclass(frozen=True)
class Approval:
    """`asked`, `deadline` and `answered` are Unix seconds; `answer`, `by_whom` and `reason` are None until then.

    `starts` is the recipe that a yes starts, '' where a yes promotes the version.
    """

    run_id: str
    verdict: int
    model: str
    version: int
    asked: float
    deadline: float
    answer: Answer | None = None
    by_whom: str | None = None
    reason: str | None = None
    answered: float | None = None
    starts: str = ""

    @property
    def name(self) -> str:
        return f"{self.model}@{self.version}"

    @property
    def what(self) -> str:
        """What the answer is about, for people."""
        return f"{self.starts}, after {self.name}" if self.starts else self.name


def ask(
    store: Store,
    run_id: str,
    verdict: int,
    model: str,
    version: int,
    *,
    seconds: float,
    escalation: dict[str, Any] | None = None,
) -> Approval:
    """Write down that a person is wanted; the same again gets what there is.

    `escalation` are the data of `run.escalation_wanted` without the deadline; `to` is the recipe that a yes starts.
    """
    starts = escalation["to"] if escalation else ""
    with store.writing() as connection:
        now = time.time()
        done = connection.execute(
            "INSERT INTO approvals (run_id, verdict, starts, model, version, asked, deadline) VALUES (?,?,?,?,?,?,?) "
            "ON CONFLICT DO NOTHING",
            (run_id, verdict, starts, model, version, now, now + seconds),
        )
        if done.rowcount:
            data = escalation or {"version": f"{model}@{version}", "verdict": verdict}
            type_ = "run.escalation_wanted" if escalation else "run.approval_wanted"
            _append(connection, run_id, type_, verdict, {**data, "deadline": now + seconds})
    return get(store, run_id, verdict, starts)


def get(store: Store, run_id: str, verdict: int, starts: str = "") -> Approval:
    row = store.first(
        "SELECT * FROM approvals WHERE run_id = ? AND verdict = ? AND starts = ?", (run_id, verdict, starts)
    )
    if row is None:
        raise NotFound(f"run {run_id} asks for no approval of verdict {verdict}", fix="`ft approve` lists what waits")
    return Approval(**row)


def of_run(store: Store, run_id: str) -> list[Approval]:
    """In the order in which they were asked for."""
    rows = store.read("SELECT * FROM approvals WHERE run_id = ? ORDER BY verdict, starts", (run_id,))
    return [Approval(**row) for row in rows]


def waiting(store: Store) -> list[Approval]:
    """Without an answer, of runs that have not ended; the oldest first."""
    rows = store.read(
        "SELECT approvals.* FROM approvals JOIN runs ON runs.id = approvals.run_id "
        "WHERE answer IS NULL AND state IN ('submitted', 'running', 'paused') ORDER BY asked"
    )
    return [Approval(**row) for row in rows]


def answer(store: Store, run_id: str, *, yes: bool, by_whom: str, reason: str = "") -> Approval:
    """A person's answer, the first of which counts.

    Raises Conflict if the run asks for none, was answered already, or its time is over.
    """
    with store.writing() as connection:
        row = connection.execute(
            "SELECT approvals.*, state FROM approvals JOIN runs ON runs.id = approvals.run_id WHERE run_id = ? "
            "ORDER BY verdict DESC, starts DESC LIMIT 1",
            (run_id,),
        ).fetchone()
        found = Approval(**_without_state(row)) if row else None
        if found is None or row["state"] not in ("submitted", "running", "paused") or found.answer:
            raise _why_not(run_id, found)
        late = row["state"] != "paused" and time.time() > found.deadline  # a paused run's time stands still
        if late:
            _settle(connection, found, "timed_out", "", "")
        else:
            _settle(connection, found, "approved" if yes else "rejected", by_whom, reason)
    now = _again(store, found)
    if late:
        raise _why_not(run_id, now)
    return now


def expire(store: Store, waiting: Approval) -> Approval:
    """Nobody answered in time. Somebody who was faster wins."""
    with store.writing() as connection:
        _settle(connection, waiting, "timed_out", "", "")
    return _again(store, waiting)


def promoted_by_hand(store: Store, waiting: Approval, by_whom: str) -> Approval:
    """Somebody has made it the champion without waiting for the run: yes to it, so no to a recipe in its place."""
    with store.writing() as connection:
        _settle(connection, waiting, "rejected" if waiting.starts else "approved", by_whom, "promoted by hand")
    return _again(store, waiting)


def move_deadline(store: Store, waiting: Approval, seconds: float) -> Approval:
    """The clock has jumped by so much: the time that is left stays the same."""
    with store.writing() as connection:
        connection.execute(
            "UPDATE approvals SET asked = asked + ?, deadline = deadline + ? "
            "WHERE run_id = ? AND verdict = ? AND starts = ? AND answer IS NULL",
            (seconds, seconds, waiting.run_id, waiting.verdict, waiting.starts),
        )
    return _again(store, waiting)


def _again(store: Store, seen: Approval) -> Approval:
    return get(store, seen.run_id, seen.verdict, seen.starts)


def _settle(connection: Connection, of: Approval, said: Answer, by_whom: str, reason: str) -> None:
    done = connection.execute(
        "UPDATE approvals SET answer = ?, by_whom = ?, reason = ?, answered = ? "
        "WHERE run_id = ? AND verdict = ? AND starts = ? AND answer IS NULL",
        (said, by_whom, reason, time.time(), of.run_id, of.verdict, of.starts),
    )
    if done.rowcount:
        about = {"to": of.starts} if of.starts else {}
        data = {"version": of.name, "verdict": of.verdict, "by": by_whom, "reason": reason, **about}
        _append(connection, of.run_id, EVENTS[said], of.verdict, data)


def _append(connection: Connection, run_id: str, type_: str, verdict: int, data: dict[str, Any]) -> None:
    key = f"{run_id}/{type_}/{verdict}{'/escalate' if 'to' in data else ''}"
    append_within(connection, new_event(RUNS, type_, run_id, data, key=key, cause=by_run(run_id)))


def _without_state(row: Any) -> dict[str, Any]:
    return {name: value for name, value in dict(row).items() if name != "state"}


def _why_not(run_id: str, found: Approval | None) -> Conflict:
    if found is None:
        return Conflict(f"{run_id} asks for no approval", fix="`ft approve` lists what waits")
    by_hand = f"`ft promote {found.name}` promotes it by hand"
    if found.starts:
        by_hand = f"`ft run {found.starts}` starts it by hand"
    if found.answer is None:
        return Conflict(f"{run_id} has ended, and nobody had answered", fix=by_hand)
    when = datetime.fromtimestamp(found.answered or 0).isoformat(sep=" ", timespec="seconds")
    if found.answer == "timed_out":
        return Conflict(f"the time to approve {found.what} was over (seen at {when})", fix=by_hand)
    return Conflict(f"{found.what} was {found.answer} already, by {found.by_whom} at {when}", fix=f"`ft show {run_id}`")

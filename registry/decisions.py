"""Decisions: which event started which run, which did not, and why. Written in one transaction with what they do.

A decision is never taken twice: (event, recipe) is its key, and the reader's cursor moves in the same transaction.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from registry import runs
from registry.durations import UNITS
from registry.events import FEEDBACK, Event, advance_within, causes, cursor_within
from registry.store import Connection, Store
from registry.triggers import Decision, Past, Subscriber

CURSOR = "triggers"


def past_of(store: Store, subscriber: Subscriber, event: Event, now: float) -> Past:
    """What the decision rests on."""
    begun = store.read(
        "SELECT created FROM runs WHERE recipe = ? AND created > ? "
        "UNION SELECT max(created) FROM runs WHERE recipe = ?",
        (subscriber.name, now - UNITS["d"], subscriber.name),
    )
    times = tuple(float(row["created"]) for row in begun if row["created"] is not None)
    active = runs.listed(store, on=True, recipe=subscriber.name, limit=99)
    return Past(
        active=tuple(each.id for each in reversed(active)),
        begun=times,
        feedback=_feedback(store, subscriber, event, max(times, default=0.0)),
        chain=chain_to(store, event),
    )


def settle(
    store: Store, event: Event, decisions: Sequence[Decision], recipes: dict[str, dict[str, Any]], seen: int
) -> bool:
    """Write the decisions, submit the runs and move the cursor on: all of it or nothing.

    `recipes` has what `runs.submit_within` needs (recipe, recipe_path, digest) by the recipe's name. False, and nothing
    done, if the cursor is no longer at `seen`: then somebody else decided, and the past is not what it was.
    """
    with store.writing() as connection:
        if cursor_within(connection, CURSOR) != seen:
            return False
        for each in decisions:
            _write(connection, event, each)
            for replaced in each.replaces:
                runs.set_wish_within(connection, replaced, "cancel")
            if each.run_id:
                runs.submit_within(connection, each.run_id, **recipes[each.recipe], cause=event.ref)
        advance_within(connection, CURSOR, event.seq)
        return True


def decisions_on(store: Store, event: Event) -> list[Decision]:
    return [_decision(row) for row in store.read("SELECT * FROM decisions WHERE seq = ? ORDER BY recipe", (event.seq,))]


def decision_for(store: Store, run_id: str) -> tuple[int, Decision] | None:
    """The event's sequence number and the decision that started the run; None where a person did."""
    row = store.first("SELECT * FROM decisions WHERE run_id = ?", (run_id,))
    return (int(row["seq"]), _decision(row)) if row else None


def chain_to(store: Store, event: Event) -> tuple[str, ...]:
    """Recipes whose runs led to the event, the first first; the event itself need not be in the log."""
    submitted = [each for each in reversed([event, *causes(store, event)]) if each.type == "run.submitted"]
    # A run's id begins with its recipe's name, which is still there when the event's data have been pruned.
    return tuple(str(each.data.get("recipe") or each.subject.rpartition("-")[0]) for each in submitted)


def _write(connection: Connection, event: Event, decision: Decision) -> None:
    connection.execute(
        "INSERT INTO decisions (seq, recipe, fired, reason, run_id, replaces, created) VALUES (?,?,?,?,?,?,?)",
        (
            event.seq,
            decision.recipe,
            int(decision.fired),
            decision.reason,
            decision.run_id,
            " ".join(decision.replaces),
            time.time(),
        ),
    )


def _decision(row: dict[str, Any]) -> Decision:
    return Decision(
        row["recipe"], bool(row["fired"]), row["reason"], row["run_id"], tuple((row["replaces"] or "").split())
    )


def _feedback(store: Store, subscriber: Subscriber, event: Event, last_run: float) -> int:
    wanted = subscriber.on.feedback
    if wanted is None or event.type != FEEDBACK:
        return 0
    # All of `model@N`: "A" comes after "@". With LIKE an underscore in a name would stand for any character.
    where = "subject >= ? AND subject < ? AND type = 'feedback.received' AND seq <= ?"
    values: list[Any] = [f"{subscriber.model}@", f"{subscriber.model}A", event.seq]
    if wanted.since_last_run:
        where, values = f"{where} AND time > ?", [*values, last_run]
    if wanted.min_rating is not None:
        where, values = f"{where} AND rating >= ?", [*values, wanted.min_rating]
    return _count(store, where, values, at_most=wanted.count if wanted.since_last_run else None)


def _count(store: Store, where: str, values: list[Any], at_most: int | None) -> int:
    """How many events; no more than `at_most` are looked at, because more do not change a decision."""
    limit, values = ("", values) if at_most is None else (" LIMIT ?", [*values, at_most])
    row = store.first(f"SELECT count(*) AS n FROM (SELECT 1 AS one FROM events WHERE {where}{limit}) AS found", values)
    return int(row["n"]) if row else 0

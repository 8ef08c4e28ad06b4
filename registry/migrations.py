"""The project's database, change by change. Append only: what was released is never edited.

Written for SQLite and Postgres alike: `REAL`, `INTEGER` and `INTEGER PRIMARY KEY AUTOINCREMENT` are turned into their
64-bit counterparts for Postgres, everything else is common to both.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

# What was pruned stays known: of events all but their data, of runs that there was one. Feedback is counted by SQL.
PRUNED = """
    ALTER TABLE events ADD COLUMN pruned INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE events ADD COLUMN rating REAL;
    CREATE INDEX feedback_by_subject ON events (subject, time, rating, seq) WHERE type = 'feedback.received';
    ALTER TABLE runs ADD COLUMN pruned REAL;
    ALTER TABLE versions ADD COLUMN pruned REAL;
    CREATE TABLE pruned_runs (
        id TEXT PRIMARY KEY, recipe TEXT NOT NULL, model TEXT NOT NULL, state TEXT NOT NULL,
        created REAL NOT NULL, pruned REAL NOT NULL, forgotten INTEGER NOT NULL DEFAULT 0);
    CREATE INDEX runs_to_tell_of ON runs (state) WHERE state IN ('failed', 'cancelled') AND told IS DISTINCT FROM state;
    """

MIGRATIONS = [
    """
    CREATE TABLE runs (
        id TEXT PRIMARY KEY, recipe TEXT NOT NULL, model TEXT NOT NULL, digest TEXT NOT NULL,
        recipe_path TEXT NOT NULL, body TEXT NOT NULL, state TEXT NOT NULL, stage TEXT NOT NULL DEFAULT '',
        wish TEXT, created REAL NOT NULL, started REAL, finished REAL, error TEXT, result TEXT);
    CREATE INDEX runs_by_recipe ON runs (recipe, created);
    CREATE INDEX runs_by_state ON runs (state);
    CREATE TABLE steps (
        run_id TEXT NOT NULL, name TEXT NOT NULL, attempt INTEGER NOT NULL,
        started REAL NOT NULL, finished REAL, kind TEXT NOT NULL, note TEXT,
        PRIMARY KEY (run_id, name, attempt));
    CREATE TABLE events (
        seq INTEGER PRIMARY KEY AUTOINCREMENT, source TEXT NOT NULL, id TEXT NOT NULL, type TEXT NOT NULL,
        subject TEXT NOT NULL, time REAL NOT NULL, data TEXT NOT NULL, cause TEXT, UNIQUE (source, id));
    CREATE TABLE versions (
        model TEXT NOT NULL, version INTEGER NOT NULL, run_id TEXT NOT NULL UNIQUE, folder TEXT NOT NULL,
        body TEXT NOT NULL, created REAL NOT NULL, rolled_back INTEGER NOT NULL DEFAULT 0,
        PRIMARY KEY (model, version));
    CREATE TABLE verdicts (
        id INTEGER PRIMARY KEY AUTOINCREMENT, model TEXT NOT NULL, version INTEGER NOT NULL,
        outcome TEXT NOT NULL, body TEXT NOT NULL, run_id TEXT, created REAL NOT NULL);
    CREATE INDEX verdicts_by_version ON verdicts (model, version, id);
    CREATE TABLE promotions (
        id INTEGER PRIMARY KEY AUTOINCREMENT, model TEXT NOT NULL, version INTEGER NOT NULL,
        from_version INTEGER, kind TEXT NOT NULL, run_id TEXT UNIQUE, verdict INTEGER,
        by_whom TEXT NOT NULL, reason TEXT NOT NULL DEFAULT '', created REAL NOT NULL);
    CREATE TABLE aliases (
        model TEXT NOT NULL, alias TEXT NOT NULL, version INTEGER NOT NULL, changed REAL NOT NULL,
        projected INTEGER, PRIMARY KEY (model, alias));
    CREATE TABLE servers (
        id TEXT PRIMARY KEY, started REAL NOT NULL, heartbeat REAL NOT NULL, body TEXT NOT NULL);
    CREATE TABLE scores (
        key TEXT PRIMARY KEY, body TEXT NOT NULL, created REAL NOT NULL);
    """,
    # What MLflow was told of: it may be away when a verdict is given or a run ends.
    """
    ALTER TABLE verdicts ADD COLUMN projected INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE runs ADD COLUMN told TEXT;
    """,
    # Events that start runs: how far each reader has come, what was decided, what was last seen of each source.
    """
    CREATE TABLE cursors (name TEXT PRIMARY KEY, seq INTEGER NOT NULL);
    INSERT INTO cursors SELECT 'triggers', coalesce(max(seq), 0) FROM events;
    CREATE TABLE decisions (
        seq INTEGER NOT NULL, recipe TEXT NOT NULL, fired INTEGER NOT NULL, reason TEXT NOT NULL,
        run_id TEXT, replaces TEXT, created REAL NOT NULL, PRIMARY KEY (seq, recipe));
    CREATE INDEX decisions_by_run ON decisions (run_id);
    CREATE TABLE seen (
        kind TEXT NOT NULL, name TEXT NOT NULL, value TEXT NOT NULL, count INTEGER NOT NULL,
        PRIMARY KEY (kind, name));
    CREATE INDEX events_by_id ON events (id);
    CREATE INDEX events_by_type ON events (type, seq);
    CREATE INDEX events_by_subject ON events (subject, seq);
    CREATE INDEX runs_by_time ON runs (created);
    CREATE INDEX runs_with_wishes ON runs (wish) WHERE wish IS NOT NULL;
    """,
    # Several hosts on one database: who lives, with which cards, and which cards nobody may begin on.
    """
    CREATE TABLE hosts (
        id TEXT PRIMARY KEY, started REAL NOT NULL, beat INTEGER NOT NULL, seen REAL NOT NULL, body TEXT NOT NULL);
    CREATE TABLE paused_cards (
        host TEXT NOT NULL, card TEXT NOT NULL, by_whom TEXT NOT NULL, since REAL NOT NULL, PRIMARY KEY (host, card));
    """,
    # What waits to be sent to the sinks of ft.yaml, and how each sink is. Aliases moved in MLflow: `projections` says
    # who tells MLflow of an alias just now, so that what ft writes there is never taken for what a person did.
    """
    CREATE TABLE outbox (
        sink TEXT NOT NULL, seq INTEGER NOT NULL, state TEXT NOT NULL, attempts INTEGER NOT NULL DEFAULT 0,
        due REAL NOT NULL, first REAL, lease TEXT, leased_until REAL, error TEXT, PRIMARY KEY (sink, seq));
    CREATE INDEX outbox_by_state ON outbox (sink, state, due);
    CREATE TABLE sinks (
        name TEXT PRIMARY KEY, delivered INTEGER NOT NULL DEFAULT 0, delivered_at REAL, error TEXT, error_at REAL,
        paused_until REAL, away INTEGER NOT NULL DEFAULT 0, failing INTEGER NOT NULL DEFAULT 0, disabled TEXT);
    CREATE TABLE projections (
        model TEXT NOT NULL, alias TEXT NOT NULL, token TEXT, since REAL, count INTEGER NOT NULL,
        PRIMARY KEY (model, alias));
    CREATE TABLE alias_refusals (
        id INTEGER PRIMARY KEY AUTOINCREMENT, model TEXT NOT NULL, version INTEGER, reason TEXT NOT NULL,
        created REAL NOT NULL, told INTEGER NOT NULL DEFAULT 0);
    """,
    PRUNED,
    # Control of runs: since when one is paused, and what persons said to a verdict.
    """
    ALTER TABLE runs ADD COLUMN paused REAL;
    CREATE TABLE approvals (
        run_id TEXT NOT NULL, verdict INTEGER NOT NULL, model TEXT NOT NULL, version INTEGER NOT NULL,
        asked REAL NOT NULL, deadline REAL NOT NULL, answer TEXT, by_whom TEXT, reason TEXT, answered REAL,
        PRIMARY KEY (run_id, verdict));
    CREATE INDEX approvals_open ON approvals (asked) WHERE answer IS NULL;
    """,
    # Beside the unique (source, id) it cost a fifth of each append in a log of a million; `events.find` does without.
    """
    DROP INDEX events_by_id;
    """,
    # Money: what was meant to be rented (`rentals`, written before the create), each pod that ever bore our name, what
    # caps were warned of. What finished runs measured (`measured`), for the planner. Serverless endpoints of ours.
    """
    CREATE TABLE installation (id TEXT PRIMARY KEY);
    CREATE TABLE rentals (
        name TEXT PRIMARY KEY, job TEXT NOT NULL, attempt INTEGER NOT NULL, recipe TEXT NOT NULL, model TEXT NOT NULL,
        state TEXT NOT NULL, gpu TEXT NOT NULL, cloud TEXT NOT NULL, pod TEXT, usd_per_hour REAL NOT NULL,
        reserved_usd REAL NOT NULL, intended REAL NOT NULL, created REAL, ended REAL, reason TEXT NOT NULL DEFAULT '',
        body TEXT NOT NULL DEFAULT '{}', UNIQUE (job, attempt));
    CREATE INDEX rentals_open ON rentals (state) WHERE state NOT IN ('ended', 'void');
    CREATE INDEX rentals_by_time ON rentals (intended);
    CREATE TABLE rented_pods (
        pod TEXT PRIMARY KEY, name TEXT NOT NULL, usd_per_hour REAL NOT NULL, created REAL NOT NULL, ended REAL,
        billed_usd REAL, final INTEGER NOT NULL DEFAULT 0);
    CREATE INDEX rented_pods_by_name ON rented_pods (name);
    CREATE TABLE budget_warnings (
        scope TEXT NOT NULL, period TEXT NOT NULL, percent INTEGER NOT NULL, PRIMARY KEY (scope, period, percent));
    CREATE TABLE measured (
        run_id TEXT PRIMARY KEY, card TEXT NOT NULL, model TEXT NOT NULL, stack TEXT NOT NULL, created REAL NOT NULL,
        body TEXT NOT NULL);
    CREATE INDEX measured_by_card ON measured (card, model, stack);
    CREATE TABLE endpoints (
        id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, model TEXT NOT NULL, version INTEGER NOT NULL,
        created REAL NOT NULL, ended REAL, billed_usd REAL NOT NULL DEFAULT 0, body TEXT NOT NULL);
    """,
    # A person is asked of one verdict twice where the recipe escalates: `starts` is the recipe that a yes would
    # start, '' where it would promote.
    """
    CREATE TABLE questions (
        run_id TEXT NOT NULL, verdict INTEGER NOT NULL, starts TEXT NOT NULL DEFAULT '', model TEXT NOT NULL,
        version INTEGER NOT NULL, asked REAL NOT NULL, deadline REAL NOT NULL, answer TEXT, by_whom TEXT, reason TEXT,
        answered REAL, PRIMARY KEY (run_id, verdict, starts));
    INSERT INTO questions (run_id, verdict, model, version, asked, deadline, answer, by_whom, reason, answered)
        SELECT run_id, verdict, model, version, asked, deadline, answer, by_whom, reason, answered FROM approvals;
    DROP TABLE approvals;
    ALTER TABLE questions RENAME TO approvals;
    CREATE INDEX approvals_open ON approvals (asked) WHERE answer IS NULL;
    """,
    # What costs by use and not by the hour (registry/charges.py).
    """
    CREATE TABLE charges (
        key TEXT PRIMARY KEY, run_id TEXT NOT NULL, recipe TEXT NOT NULL, what TEXT NOT NULL,
        reserved_usd REAL NOT NULL, usd REAL NOT NULL DEFAULT 0, created REAL NOT NULL, ended REAL);
    CREATE INDEX charges_by_run ON charges (run_id);
    """,
    # Hosts that share this database and not the project's folder: the folder from which runs are led.
    """
    CREATE TABLE leading_folder (one INTEGER PRIMARY KEY, folder TEXT NOT NULL, since REAL NOT NULL);
    """,
    # Who may ask the gateway (registry/api_keys.py).
    """
    CREATE TABLE api_keys (
        name TEXT PRIMARY KEY, digest TEXT NOT NULL UNIQUE, routes TEXT, rate REAL, burst INTEGER NOT NULL,
        created REAL NOT NULL, by_whom TEXT NOT NULL, revoked REAL);
    """,
    # Several gateways: which server leads (its epoch fences what it publishes), what it publishes, who follows how far.
    """
    CREATE TABLE serving_lead (
        one INTEGER PRIMARY KEY, epoch INTEGER NOT NULL, lease TEXT NOT NULL, host TEXT NOT NULL, beat INTEGER NOT NULL,
        term REAL NOT NULL, since REAL NOT NULL, released INTEGER NOT NULL DEFAULT 0);
    CREATE TABLE served_routes (
        one INTEGER PRIMARY KEY, generation INTEGER NOT NULL, epoch INTEGER NOT NULL, published REAL NOT NULL,
        body TEXT NOT NULL);
    CREATE TABLE gateways (
        id TEXT PRIMARY KEY, host TEXT NOT NULL, url TEXT NOT NULL, started REAL NOT NULL, beat INTEGER NOT NULL,
        term REAL NOT NULL, seen REAL NOT NULL, acknowledged INTEGER NOT NULL, in_flight TEXT NOT NULL,
        wanted TEXT NOT NULL, used TEXT NOT NULL);
    """,
    # Canaries (registry/rollouts.py); of a model one at a time.
    """
    CREATE TABLE rollouts (
        id INTEGER PRIMARY KEY AUTOINCREMENT, model TEXT NOT NULL, version INTEGER NOT NULL,
        from_version INTEGER NOT NULL, verdict INTEGER NOT NULL, terms TEXT NOT NULL, step INTEGER NOT NULL,
        step_since REAL NOT NULL, held REAL NOT NULL DEFAULT 0, ticked REAL, counts TEXT NOT NULL DEFAULT '{}',
        state TEXT NOT NULL, reason TEXT NOT NULL DEFAULT '', by_whom TEXT NOT NULL, person INTEGER NOT NULL DEFAULT 0,
        run_id TEXT UNIQUE, created REAL NOT NULL, ended REAL);
    CREATE UNIQUE INDEX rollouts_running ON rollouts (model) WHERE state = 'running';
    """,
]


def rating_of(data: Any) -> float | None:
    """The rating in a feedback event's data, if it is a number."""
    rating = data.get("rating") if isinstance(data, dict) else None
    return float(rating) if isinstance(rating, int | float) and not isinstance(rating, bool) else None


def _fill_ratings(connection: Any) -> None:
    rows = list(connection.execute("SELECT seq, data FROM events WHERE type = 'feedback.received'"))
    values = [(_rating_in(row["data"]), row["seq"]) for row in rows]
    connection.executemany("UPDATE events SET rating = ? WHERE seq = ?", values)


def _rating_in(text: str) -> float | None:
    try:
        return rating_of(json.loads(text))
    except ValueError:  # damaged by hand: reading that event says so
        return None


# What SQL for both databases cannot say, done in the same transaction as its script.
AFTERWARDS: dict[str, Callable[[Any], None]] = {PRUNED: _fill_ratings}

"""Watches the aliases in MLflow: a `champion` that somebody moved there is a request, and goes the same way as others.

Polled, because MLflow's webhooks can be lost; one that comes only makes it look at once.
"""

from __future__ import annotations

import sys
import time
import traceback
from dataclasses import dataclass, field

from registry.alias_requests import ALIAS, Refusal, decide_request, mark_refusal_told, standing, untold_refusals
from registry.errors import FtError, TrackerError
from registry.mlflow_look import aliases_at
from registry.mlflow_mirror import tell_alias, tracker_of
from registry.mlflow_store import Tracker
from registry.project import Project
from registry.store import Store
from serving.server_record import unjudged_models

POLL_SECONDS, LOOK_SECONDS = 10.0, 0.2
# What the receiver makes of MLflow's webhooks; "/" comes after ".".
HINTS = [f"external.mlflow.{entity}_alias" for entity in ("model_version", "registered_model")]


@dataclass
class AliasWatch:
    """Of one project; `run` is a thread of its worker and returns never."""

    project: Project
    store: Store
    _hint: int = 0
    _said: set[str] = field(default_factory=set)

    def run(self) -> None:
        changes, polled = self.store.database.changes(), 0.0
        while True:
            try:
                if time.monotonic() - polled > POLL_SECONDS or self._has_hint():
                    polled = time.monotonic()
                    self.look()
            except Exception:  # a full disk, a database that is away: no reason for the worker to end
                traceback.print_exc()
                time.sleep(POLL_SECONDS)
            time.sleep(LOOK_SECONDS)  # while runs write all the time, waiting for a change would not be waiting
            changes.wait(max(0.0, POLL_SECONDS - (time.monotonic() - polled)), LOOK_SECONDS)

    def look(self) -> None:
        """Compare MLflow's aliases with ours, once. An MLflow that is away is left alone for this time."""
        away: set[str] = set()
        for model in sorted({each["model"] for each in self.store.read("SELECT DISTINCT model FROM versions")}):
            self._unless_away(away, model)
        for refusal in untold_refusals(self.store):
            self._tell(refusal)

    def _unless_away(self, away: set[str], model: str) -> None:
        try:
            tracker = tracker_of(self.project, self.store, model)
            if tracker.uri in away:
                return
            try:
                self._compare(tracker, model)
            except TrackerError as error:
                away.add(tracker.uri)
                self._say_once(error)
        except (FtError, KeyError, ValueError) as error:  # a version whose recipe is not there, or is wrong
            self._say_once(error)

    def _compare(self, tracker: Tracker, model: str) -> None:
        before = standing(self.store, model)
        if before is None:
            return
        found = aliases_at(tracker, model)
        if found is None or found.get(ALIAS) == before.version:
            return
        allowed = model in unjudged_models(self.store)
        if decide_request(self.store, before, found.get(ALIAS), unjudged=allowed) == "":
            for alias in (ALIAS, "previous"):
                tell_alias(self.store, tracker, model, alias)

    def _tell(self, refusal: Refusal) -> None:
        """Put MLflow's alias back, and the reason beside the version that it was moved to."""
        try:
            tracker = tracker_of(self.project, self.store, refusal.model)
            tell_alias(self.store, tracker, refusal.model, ALIAS)
            if refusal.version is not None:
                tracker.tag_refused(refusal.model, refusal.version, refusal.reason)
            mark_refusal_told(self.store, refusal)
        except FtError as error:
            self._say_once(error)

    def _has_hint(self) -> bool:
        """Has MLflow told of an alias since the last look?"""
        row = self.store.first(
            "SELECT max(seq) AS seq FROM events WHERE seq > ? AND ((type > ? AND type < ?) OR (type > ? AND type < ?))",
            (self._hint, *(hint + end for hint in HINTS for end in "./")),
        )
        if row is None or row["seq"] is None:
            return False
        self._hint = int(row["seq"])
        return True

    def _say_once(self, error: Exception) -> None:
        if str(error) not in self._said:
            self._said.add(str(error))
            print(f"aliases in MLflow are not looked at: {error}", file=sys.stderr, flush=True)

"""From events to runs: reads the log with a cursor, decides for each recipe with triggers, and submits.

`watch` turns what changed outside of the log into events: datasets, recipes, the clock. What it misses while no worker
is up it finds when one is.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.broken_recipes import Broken, as_broken
from registry import recipe as recipes
from registry.decisions import CURSOR, past_of, settle
from registry.errors import FtError, RecipeError, StoreError
from registry.events import Event, advance, cursor, read
from registry.project import Project, recipe_files
from registry.recipe import Finetune, Recipe
from registry.recipe_kinds import load_any
from registry.seen import last_clock, note_all, note_clock, note_datasets
from registry.store import Store
from registry.triggers import Subscriber, decide, due, listens

WATCH_SECONDS = 2.0
BATCH = 200
# What of a recipe says when and how a run is done, not what is trained.
NOT_MEANT = {"on", "description", "approval", "retries", "timeouts", "cloud", "budget", "escalate"}


@dataclass(frozen=True)
class Known:
    """A recipe as its file was last read; `path` is relative to the project."""

    loaded: Recipe
    path: str

    @property
    def meaning(self) -> str:
        """A digest of what is trained and how, without when; a field that a newer ft adds does not change it."""
        body = self.loaded.model_dump(mode="json", exclude_defaults=True, exclude=NOT_MEANT)
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()

    @property
    def subscriber(self) -> Subscriber | None:
        found = self.loaded
        return Subscriber(found.name, found.model, found.data.path, found.on) if found.on else None

    def row(self) -> dict[str, Any]:
        """What `runs.submit_within` needs."""
        return {"recipe": self.loaded.model_dump(mode="json"), "recipe_path": self.path,
                "digest": recipes.digest(self.loaded)}  # fmt: skip


@dataclass
class Dispatcher:
    """Of one project; its worker calls `work` again and again."""

    project: Project
    store: Store
    _files: dict[Path, tuple[int, Recipe | FtError]] = field(default_factory=dict)
    _before: dict[Path, Subscriber | None] = field(default_factory=dict)
    _said: set[str] = field(default_factory=set)
    _watched: float = 0.0

    def work(self) -> int:
        """Look at the world now and then, and at every new event; how many events there were."""
        if time.monotonic() - self._watched > WATCH_SECONDS:
            self._watched = time.monotonic()
            self.watch()
        seen = cursor(self.store, CURSOR)
        events = read(self.store, after=seen, limit=BATCH)
        known = self._known() if events else []
        broken = self._broken() if events else []
        for event in events:
            listening = [each for each in known if each.subscriber and listens(each.subscriber, event)]
            deaf = [each for each in broken if each.hears(event)]
            if not listening and not deaf:
                continue
            if not self._dispatch(event, listening, deaf, seen):
                return len(events)  # somebody else did; look again
            seen = event.seq
        if events:
            advance(self.store, CURSOR, events[-1].seq)
        return len(events)

    def watch(self) -> None:
        """Changed datasets and recipes, and cron lines that have come due, become events.

        A file that cannot be read keeps nobody from the rest, and is told of once.
        """
        known = self._known()
        subscribers = [each.subscriber for each in known if each.subscriber]
        if not subscribers:
            return
        values = {each.loaded.name: (each.meaning, {"digest": each.meaning}) for each in known}
        self._try(lambda: note_datasets(self.project, self.store))
        self._try(lambda: note_all(self.project, self.store, "recipe", "recipe.changed", values))
        for subscriber in subscribers:
            self._look_at_the_clock(subscriber, time.time())

    def _dispatch(self, event: Event, listening: list[Known], deaf: list[Broken], seen: int) -> bool:
        """Decide for each recipe that listens, and write all of it at once."""
        now = time.time()
        subscribers = [each.subscriber for each in listening if each.subscriber]
        decisions = [decide(each, event, past_of(self.store, each, event, now), now) for each in subscribers]
        names = {each.recipe for each in decisions}
        decisions += {each.name: each.decision for each in deaf if each.name not in names}.values()
        return settle(self.store, event, decisions, {each.loaded.name: each.row() for each in listening}, seen)

    def _look_at_the_clock(self, subscriber: Subscriber, now: float) -> None:
        zone = subscriber.on.timezone
        for line in subscriber.on.schedule:
            last = due(line, zone, last_clock(self.store, subscriber.name, line, zone, now), now)
            if last:
                note_clock(self.store, subscriber.name, line, zone, last)

    def _known(self) -> list[Known]:
        """The project's recipes, read again when their files change; what is wrong is told of once, and left out."""
        self._files = {path: each for path in recipe_files(self.project) if (each := self._read(path))}
        known: dict[str, Known] = {}
        for path, (_, loaded) in self._files.items():
            if isinstance(loaded, FtError):
                self._say_once(loaded)
            elif loaded.name in known:
                other = known[loaded.name].path
                self._say_once(RecipeError(f"{other} is called '{loaded.name}' too", place=str(path), fix="rename one"))
            else:
                known[loaded.name] = Known(loaded, str(path.relative_to(self.project.root)))
                self._before[path] = known[loaded.name].subscriber
        return list(known.values())

    def _broken(self) -> list[Broken]:
        """Recipes with triggers whose files are wrong now."""
        wrong = [(path, loaded) for path, (_, loaded) in self._files.items() if isinstance(loaded, FtError)]
        found = [as_broken(path, error, self._before.get(path)) for path, error in wrong]
        return [each for each in found if each]

    def _read(self, path: Path) -> tuple[int, Recipe | FtError] | None:
        try:
            changed, before = path.stat().st_mtime_ns, self._files.get(path)
            if before and before[0] == changed:
                return before
            found = load_any(path)
            return (changed, found) if isinstance(found, Finetune) else None  # what serves has no triggers
        except FtError as error:
            return changed, error
        except OSError:  # deleted meanwhile
            return None

    def _try(self, look: Callable[[], object]) -> None:
        try:
            look()
        except StoreError:
            raise
        except (FtError, OSError, AttributeError, TypeError, ValueError) as error:  # a record that is half-written
            self._say_once(error)

    def _say_once(self, error: Exception) -> None:
        if str(error) not in self._said:
            self._said.add(str(error))
            print(f"starts no runs until it is right: {error}", file=sys.stderr, flush=True)


def has_news(store: Store) -> bool:
    """Are there events that nobody has decided on yet?"""
    return bool(read(store, after=cursor(store, CURSOR), limit=1))

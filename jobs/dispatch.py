"""From events to runs: reads the log with a cursor, decides for each recipe with triggers, and submits.

`watch` turns what changed outside of the log into events: datasets, recipes, the clock. What it misses while no worker
is up it finds when one is.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from registry import recipe as recipes
from registry.decisions import CURSOR, past_of, settle
from registry.errors import FtError, RecipeError
from registry.events import Event, advance, cursor, read
from registry.project import Project
from registry.recipe import Recipe
from registry.seen import git_branch, last_seen, note_all, note_datasets, note_silently, note_value
from registry.store import Store
from registry.triggers import Subscriber, decide, due, listens

WATCH_SECONDS = 2.0
BATCH = 200


@dataclass(frozen=True)
class Known:
    """A recipe as its file was last read; `path` is relative to the project."""

    loaded: Recipe
    path: str
    digest: str

    @property
    def subscriber(self) -> Subscriber | None:
        found = self.loaded
        return Subscriber(found.name, found.model, found.data.path, found.on) if found.on else None

    def row(self) -> dict[str, Any]:
        """What `runs.submit_within` needs."""
        return {"recipe": self.loaded.model_dump(mode="json"), "recipe_path": self.path, "digest": self.digest}


@dataclass
class Dispatcher:
    """Of one project; its worker calls `work` again and again."""

    project: Project
    store: Store
    _files: dict[Path, tuple[int, Known | None]] = field(default_factory=dict)
    _watched: float = 0.0

    def work(self) -> int:
        """Look at the world now and then, and at every new event; how many events there were."""
        if time.monotonic() - self._watched > WATCH_SECONDS:
            self._watched = time.monotonic()
            self.watch()
        seen = cursor(self.store, CURSOR)
        events = read(self.store, after=seen, limit=BATCH)
        known = self._known() if events else []
        for event in events:
            listening = [each for each in known if each.subscriber and listens(each.subscriber, event)]
            if listening and not self._dispatch(event, listening, seen):
                return len(events)  # somebody else did; look again
            seen = event.seq if listening else seen
        if events:
            advance(self.store, CURSOR, events[-1].seq)
        return len(events)

    def watch(self) -> None:
        """Changed datasets and recipes, and cron lines that have come due, become events."""
        note_datasets(self.project, self.store)
        known, branch = self._known(), git_branch(self.project.root)
        values = {each.loaded.name: (each.digest, {"digest": each.digest, "branch": branch}) for each in known}
        note_all(self.store, "recipe", "recipe.changed", values)
        for each in known:
            if each.subscriber:
                self._look_at_the_clock(each.subscriber, time.time())

    def _dispatch(self, event: Event, listening: list[Known], seen: int) -> bool:
        """Decide for each recipe that listens, and write all of it at once."""
        now = time.time()
        subscribers = [each.subscriber for each in listening if each.subscriber]
        decisions = [decide(each, event, past_of(self.store, each, event, now), now) for each in subscribers]
        return settle(self.store, event, decisions, {each.loaded.name: each.row() for each in listening}, seen)

    def _look_at_the_clock(self, subscriber: Subscriber, now: float) -> None:
        for line in subscriber.on.schedule:
            name = f"{subscriber.name}: {line}"
            seen = last_seen(self.store, "schedule", name)
            last = due(line, subscriber.on.timezone, float(seen) if seen else 0.0, now)
            if seen is None:  # what was due before anybody watched is not made up for
                note_silently(self.store, "schedule", {name: str(last or now)})
            elif last:
                data = {"cron": line, "due": last}
                note_value(self.store, "schedule", name, str(last), "schedule.fired", data, subscriber.name)

    def _known(self) -> list[Known]:
        """The project's recipes, read again when their files change; a broken one is told of once, and left out."""
        found: dict[Path, tuple[int, Known | None]] = {}
        names: set[str] = set()
        for path in sorted((self.project.root / "recipes").glob("*.y*ml")):
            changed, before = path.stat().st_mtime_ns, self._files.get(path)
            found[path] = before if before and before[0] == changed else (changed, self._load(path, names))
            names |= {known.loaded.name for known in [found[path][1]] if known}
        self._files = found
        return [known for _, known in found.values() if known]

    def _load(self, path: Path, names: set[str]) -> Known | None:
        try:
            loaded = recipes.load_recipe(path)
            if loaded.name in names:
                raise RecipeError(f"another recipe is called '{loaded.name}' too", place=str(path), fix="rename one")
        except FtError as error:
            print(f"this recipe starts no runs until it is right: {error}", file=sys.stderr, flush=True)
            return None
        return Known(loaded, str(path.relative_to(self.project.root)), recipes.digest(loaded))


def has_news(store: Store) -> bool:
    """Are there events that nobody has decided on yet?"""
    return bool(read(store, after=cursor(store, CURSOR), limit=1))

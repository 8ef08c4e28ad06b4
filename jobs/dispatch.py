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
from registry.errors import FtError
from registry.events import Event, advance, cursor, read
from registry.project import Project
from registry.recipe import Recipe
from registry.seen import git_branch, last_seen, note_all, note_datasets, note_silently, note_value
from registry.store import Store
from registry.triggers import Subscriber, decide, due, listens

WATCH_SECONDS = 2.0
BATCH = 200


@dataclass
class Dispatcher:
    """Of one project; its worker calls `work` again and again."""

    project: Project
    store: Store
    _files: dict[Path, tuple[int, Recipe | None]] = field(default_factory=dict)
    _watched: float = 0.0

    def work(self) -> int:
        """Look at the world now and then, and at every new event; how many events there were."""
        if time.monotonic() - self._watched > WATCH_SECONDS:
            self._watched = time.monotonic()
            self.watch()
        seen = cursor(self.store, CURSOR)
        events = read(self.store, after=seen, limit=BATCH)
        for event in events:
            listening = [each for each in self.subscribers() if listens(each, event)]
            if listening and not self._dispatch(event, listening, seen):
                return len(events)  # somebody else did; look again
            seen = event.seq if listening else seen
        if events:
            advance(self.store, CURSOR, events[-1].seq)
        return len(events)

    def watch(self) -> None:
        """Changed datasets and recipes, and cron lines that have come due, become events."""
        note_datasets(self.project, self.store)
        branch = git_branch(self.project.root)
        values = {
            loaded.name: (recipes.digest(loaded), {"digest": recipes.digest(loaded), "branch": branch})
            for loaded in self._loaded().values()
        }
        note_all(self.store, "recipe", "recipe.changed", values)
        for subscriber in self.subscribers():
            self._look_at_the_clock(subscriber, time.time())

    def subscribers(self) -> list[Subscriber]:
        return [
            Subscriber(loaded.name, loaded.model, loaded.data.path, loaded.on)
            for loaded in self._loaded().values()
            if loaded.on
        ]

    def _dispatch(self, event: Event, listening: list[Subscriber], seen: int) -> bool:
        """Decide for each recipe that listens, and write all of it at once."""
        now = time.time()
        decisions = [decide(each, event, past_of(self.store, each, event, now), now) for each in listening]
        return settle(self.store, event, decisions, {each.name: self._row(each.name) for each in listening}, seen)

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

    def _loaded(self) -> dict[Path, Recipe]:
        """The project's recipes, read again when their files change; a broken one is told of once, and left out."""
        found: dict[Path, tuple[int, Recipe | None]] = {}
        for path in sorted((self.project.root / "recipes").glob("*.y*ml")):
            changed = path.stat().st_mtime_ns
            known = self._files.get(path)
            found[path] = known if known and known[0] == changed else (changed, _load(path))
        self._files = found
        return {path: loaded for path, (_, loaded) in found.items() if loaded}

    def _row(self, name: str) -> dict[str, Any]:
        path, loaded = next((path, each) for path, each in self._loaded().items() if each.name == name)
        shown = str(path.relative_to(self.project.root))
        body = loaded.model_dump(mode="json")
        return {"recipe": body, "recipe_path": shown, "digest": recipes.digest(loaded)}


def has_news(store: Store) -> bool:
    """Are there events that nobody has decided on yet?"""
    return bool(read(store, after=cursor(store, CURSOR), limit=1))


def _load(path: Path) -> Recipe | None:
    try:
        return recipes.load_recipe(path)
    except FtError as error:
        print(f"this recipe starts no runs until it is right: {error}", file=sys.stderr, flush=True)
        return None

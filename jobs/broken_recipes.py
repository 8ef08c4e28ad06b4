"""A recipe whose file is wrong hears nothing; what it would have heard, as far as can be told, is written down."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from registry.errors import FtError
from registry.events import Event
from registry.project import has_triggers, text_of
from registry.triggers import Decision, Subscriber, Triggers, listens

LONG = 300


@dataclass(frozen=True)
class Broken:
    """`subscriber` is what can still be read of its triggers; None: only that it has some, so any event may be one."""

    name: str
    why: str
    subscriber: Subscriber | None

    def hears(self, event: Event) -> bool:
        return self.subscriber is None or bool(listens(self.subscriber, event))

    @property
    def decision(self) -> Decision:
        return Decision(self.name, False, f"its recipe was broken when the event passed: {self.why}"[:LONG])


def as_broken(path: Path, error: FtError, before: Subscriber | None) -> Broken | None:
    """None if nothing says that the recipe has triggers. `before` is what it had when its file was right."""
    text = text_of(path)
    found = _subscriber(path, text) or before
    if found is None and not has_triggers(text):
        return None
    return Broken(found.name if found else path.stem, " ".join(error.what.split()), found)


def _subscriber(path: Path, text: str) -> Subscriber | None:
    try:
        plain = yaml.safe_load(text)
    except yaml.YAMLError:
        return None
    if not isinstance(plain, dict):
        return None
    # YAML 1.1, which is read here, takes `on` for true.
    return _from_mapping(path.stem, {("on" if key is True else key): value for key, value in plain.items()})


def _from_mapping(stem: str, plain: dict[str, Any]) -> Subscriber | None:
    name, data = str(plain.get("name", stem)), plain.get("data")
    dataset = str(data.get("path", "")) if isinstance(data, dict) else ""
    try:
        return Subscriber(name, str(plain.get("model", name)), dataset, Triggers.model_validate(plain.get("on")))
    except ValidationError:
        return None

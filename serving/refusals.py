"""What the receiver refused, as `webhook.refused` events: so few that nobody can fill the log with them.

The first of a kind is told at once, those after it together: after a minute, then two, up to an hour.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from registry.events import Event, new_event
from serving.http_messages import Refusal

SOURCE = "ft/receiver"
FIRST_PAUSE, LONGEST_PAUSE = 60.0, 3600.0
LONGEST = 200


@dataclass
class Kind:
    """Refusals of one door for one reason: those not told yet, and how long to wait before the next is told."""

    pause: float = FIRST_PAUSE
    untold: int = 0
    last: dict[str, str] = field(default_factory=dict)
    timer: asyncio.TimerHandle | None = None


class Refusals:
    """`tell` appends an event; it must not wait. Used from within one event loop."""

    def __init__(self, tell: Callable[[Event], None]) -> None:
        self._tell = tell
        self._kinds: dict[tuple[str, str], Kind] = {}

    def note(self, door: str, refusal: Refusal, delivery: str, client: str) -> None:
        """`door` is github, mlflow or events; `delivery` is what the sender calls it."""
        kind = self._kinds.setdefault((door, refusal.code), Kind())
        kind.untold += 1
        kind.last = {"reason": _line(refusal.message), "delivery": _line(delivery), "client": _line(client)}
        if kind.timer is None:
            self._say(door, kind)

    def close(self) -> None:
        """Tell of those that were not told of yet."""
        for (door, _), kind in self._kinds.items():
            if kind.timer is not None:
                kind.timer.cancel()
            if kind.untold:
                self._append(door, kind)

    def _say(self, door: str, kind: Kind) -> None:
        """Tell now, and look again after the pause, which grows while there is something to tell."""
        self._append(door, kind)
        kind.timer = asyncio.get_running_loop().call_later(kind.pause, self._look, door, kind)

    def _look(self, door: str, kind: Kind) -> None:
        kind.timer = None
        if kind.untold:
            kind.pause = min(LONGEST_PAUSE, 2 * kind.pause)
            self._say(door, kind)
        else:
            kind.pause = FIRST_PAUSE

    def _append(self, door: str, kind: Kind) -> None:
        data = {name: value for name, value in kind.last.items() if value}
        self._tell(new_event(SOURCE, "webhook.refused", door, {**data, "count": kind.untold}))
        kind.untold = 0


def _line(text: str) -> str:
    return "".join(each if each.isprintable() else " " for each in text[:LONGEST])

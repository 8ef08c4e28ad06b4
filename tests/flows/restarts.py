"""What goes on beside runs: Postgres is restarted again and again, and others append events."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from types import TracebackType

from registry.errors import StoreError
from registry.events import append, new_event, read
from tests.flows.swept_project import Swept
from tests.postgres_server import PostgresServer

BETWEEN_SECONDS = (5.0, 20.0)
NOISE_SECONDS = 0.1


class Restarts:
    """`with Restarts(server, dice) as restarts:`; `done` counts them."""

    def __init__(self, server: PostgresServer, dice: random.Random) -> None:
        self.server, self.dice, self.done = server, random.Random(dice.random()), 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._restart, name="restarts")

    def __enter__(self) -> Restarts:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def _restart(self) -> None:
        while not self._over.wait(self.dice.uniform(*BETWEEN_SECONDS)):
            self.server.restart()
            self.done += 1


class Noise:
    """Somebody who posts an event ten times a second, and again each one that was not taken. `sent` has their ids."""

    def __init__(self, swept: Swept) -> None:
        self.swept = swept
        self.sent: list[str] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._post, name="noise")

    def __enter__(self) -> Noise:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def lost(self) -> list[str]:
        """Ids that are not in the log exactly once."""
        found = Counter(each.id for each in read(self.swept.store, type_="external.noise", limit=1_000_000))
        return [each for each in self.sent if found[each] != 1]

    def _post(self) -> None:
        store = self.swept.store
        while not self._over.wait(NOISE_SECONDS):
            event = new_event("tests/noise", "external.noise", "", {})
            while event.id not in self.sent[-1:]:
                try:
                    append(store, event)
                    self.sent.append(event.id)
                except StoreError:
                    time.sleep(NOISE_SECONDS)

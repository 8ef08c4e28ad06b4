"""Notices at once when an alias or a rollout has moved, whoever moved it, so that no swap waits for the next round."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from registry.errors import StoreError
from registry.store import Store
from serving.routes import Board

# SQLite is asked for its change counter this often (0.01 ms each time); Postgres says by itself.
LOOK_SECONDS = 0.01
ENDS_SECONDS = 0.5
MARK = """SELECT
    (SELECT max(id) FROM promotions) AS moves, (SELECT max(changed) FROM aliases) AS changed,
    (SELECT max(id) FROM rollouts) AS rollouts, (SELECT count(*) FROM rollouts WHERE state = 'running') AS running,
    (SELECT sum(step) FROM rollouts WHERE state = 'running') AS steps"""


@contextmanager
def watching_moves(store: Store, board: Board) -> Iterator[None]:
    """While the block runs, `board.poke()` at every move. To be used inside the event loop of the board."""
    loop, stop = asyncio.get_running_loop(), threading.Event()

    def tell() -> None:
        if not stop.is_set():
            loop.call_soon_threadsafe(board.poke)

    thread = threading.Thread(target=_watch, args=(store, stop, tell), name="moves", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()  # not waited for: the loop has answers to end meanwhile


def _watch(store: Store, stop: threading.Event, tell: Callable[[], None]) -> None:
    seen: object = None
    while not stop.is_set():
        try:
            changes, seen = store.database.changes(), seen or _mark(store)
            while not stop.is_set():
                changes.wait(ENDS_SECONDS, LOOK_SECONDS)
                if (now := _mark(store)) != seen:
                    seen = now
                    tell()
        except StoreError:  # away for a moment: the rounds go on by the clock meanwhile
            stop.wait(1.0)


def _mark(store: Store) -> object:
    return store.first(MARK)

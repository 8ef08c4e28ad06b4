"""From many requests at once to few transactions: one thread commits all events that wait, then tells who waits."""

from __future__ import annotations

import asyncio
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from registry.errors import StoreError
from registry.events import Event, append_all
from registry.store import Store
from serving.http_messages import Refusal

# GitHub gives up after ten seconds, so it is told before that.
PATIENCE_SECONDS = 8.0
MOST_WAITING = 20_000
RETRY_AFTER = 5

New = list[bool]


@dataclass
class Wanted:
    """The events of one request and who waits for them; given up when nobody does any more."""

    events: Sequence[Event]
    done: asyncio.Future[New]
    given_up: bool = False


class Inbox:
    """Of one store. `failure` is what its last transaction failed with, '' if it did not."""

    def __init__(self, store: Store) -> None:
        self.failure = ""
        self._store = store
        self._waiting: list[Wanted] = []
        self._size = 0
        self._there = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="inbox", daemon=True)
        self._thread.start()

    async def append(self, events: Sequence[Event]) -> New:
        """Wait until they are committed; for each: was it new? Raises Refusal (503): then send them again.

        After a 503 they may still be in the log, as after any answer that was lost; their ids keep them single.
        """
        if not events:
            return []
        wanted = Wanted(events, asyncio.get_running_loop().create_future())
        self._put(wanted)
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                return await wanted.done
        except TimeoutError:
            raise _later(f"the store has not taken them within {PATIENCE_SECONDS:.0f} s") from None
        finally:
            wanted.given_up = True

    def close(self) -> None:
        """Commit what waits, and end."""
        with self._there:
            self._closed = True
            self._there.notify()
        self._thread.join()

    def _put(self, wanted: Wanted) -> None:
        with self._there:
            if self._closed or self._size + len(wanted.events) > MOST_WAITING:
                raise _later("it is ending" if self._closed else f"{self._size} events wait for the store already")
            self._waiting.append(wanted)
            self._size += len(wanted.events)
            self._there.notify()

    def _work(self) -> None:
        while True:
            with self._there:
                while not self._waiting and not self._closed:
                    self._there.wait()
                group, self._waiting = self._waiting, []
            if not group:
                return
            self._commit([each for each in group if not each.given_up])
            with self._there:
                self._size -= sum(len(each.events) for each in group)

    def _commit(self, group: list[Wanted]) -> None:
        if not group:
            return
        try:
            new = append_all(self._store, [event for each in group for event in each.events])
        except StoreError as error:
            self._fail(group, error)
        except Exception as error:
            # One event that the database cannot take must not keep out those beside it.
            if len(group) > 1:
                for each in group:
                    self._commit([each])
                return
            traceback.print_exc()
            self._fail(group, error)
        else:
            self.failure = ""
            _tell(group, new)

    def _fail(self, group: list[Wanted], error: Exception) -> None:
        if str(error) != self.failure:
            self.failure = str(error)
            print(f"nothing is appended: {error}", file=sys.stderr, flush=True)
        _tell(group, None)


def _tell(group: list[Wanted], new: New | None) -> None:
    """In the thread of whoever waits; `new` has the answers of all of them, None says that it failed."""
    start = 0
    for each in group:
        end = start + len(each.events)
        with suppress(RuntimeError):  # its loop has ended
            each.done.get_loop().call_soon_threadsafe(_resolve, each.done, new[start:end] if new is not None else None)
        start = end


def _resolve(done: asyncio.Future[New], new: New | None) -> None:
    if done.done():
        return
    if new is None:
        done.set_exception(_later("the store cannot be written to; the receiver's output says why"))
    else:
        done.set_result(new)


def _later(why: str) -> Refusal:
    return Refusal(503, f"not appended: {why}; send it again", "store_away", retry_after=RETRY_AFTER)

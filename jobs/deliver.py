"""Sends what happens to the sinks of ft.yaml, in threads of the worker, from the durable outbox.

One thread looks at the log and at ft.yaml; each sink that has something to get has a thread while it has. A receiver
that hangs keeps no other waiting, and a worker without sinks only looks at the file's time.
"""

from __future__ import annotations

import random
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from functools import partial

from jobs.post_message import post
from jobs.sink_answer import judge_answer
from registry import outbox
from registry.errors import FtError
from registry.events import at
from registry.project import Project
from registry.settings import load_settings
from registry.sink_message import message, trial_event
from registry.sinks import Sink, digest_of, wants
from registry.store import Store

FILE_SECONDS = 2.0
QUIET_SECONDS, LOOK_SECONDS = 5.0, 0.1
LEASE_MARGIN_SECONDS = 30.0
# What comes due within this keeps a worker from ending; what is put off for longer waits for the next one.
NEAR_SECONDS = 60.0


@dataclass
class Deliverer:
    """Of one project; `start` once, then `busy` says whether the worker may end."""

    project: Project
    store: Store
    sinks: tuple[Sink, ...] = ()
    _changed: int | None = None
    _sending: dict[str, threading.Thread] = field(default_factory=dict)

    def start(self) -> None:
        self._read_file()
        threading.Thread(target=self._run, name="sinks", daemon=True).start()

    def busy(self) -> bool:
        """Is there anything to send now or within a minute?"""
        return any(self._is_near(each) for each in self._ready())

    def look(self) -> float:
        """Put what is new into the outboxes and send what is due; seconds until there is more to do."""
        now, times = time.time(), [time.time() + QUIET_SECONDS]
        for sink in self._ready():
            outbox.begin(self.store, sink.name)
            while outbox.fill(self.store, sink.name, partial(wants, sink)):
                pass
            due = outbox.next_due(self.store, sink.name)
            if due is not None and due <= now:
                self._begin_sending(sink)
            if due is not None:  # also what is being sent now: its thread may just be ending
                times.append(max(due, now + LOOK_SECONDS))
        return max(0.0, min(times) - now)

    def _run(self) -> None:
        changes = self.store.database.changes()
        while True:
            try:
                self._read_file()
                if self.sinks:
                    changes.wait(min(self.look(), FILE_SECONDS), LOOK_SECONDS)
                    time.sleep(LOOK_SECONDS / 2)  # while runs write all the time, the wait above is none
                else:
                    time.sleep(FILE_SECONDS)
            except Exception:  # a full disk, a database that is away: no reason for the worker to end
                traceback.print_exc()
                time.sleep(FILE_SECONDS)

    def _read_file(self) -> None:
        """The sinks of ft.yaml as it is now; of a file that is wrong, those that it had before."""
        path = self.project.root / "ft.yaml"
        changed = path.stat().st_mtime_ns if path.is_file() else 0
        if changed == self._changed:
            return
        self._changed = changed
        try:
            self.sinks = load_settings(self.project).sinks
        except FtError as error:
            print(f"sinks stay as they were until it is right: {error}", file=sys.stderr, flush=True)

    def _ready(self) -> list[Sink]:
        """Those that can be sent something; what the others lack is said."""
        return [sink for sink in self.sinks if self._is_ready(sink)]

    def _is_ready(self, sink: Sink) -> bool:
        try:
            url = message(sink, trial_event(sink), 0).url
        except FtError as error:
            outbox.begin(self.store, sink.name)
            outbox.note_error(self.store, sink.name, str(error).replace("\n", " "))
            return False
        return outbox.disabled(self.store, sink.name) != digest_of(url)

    def _is_near(self, sink: Sink) -> bool:
        due = outbox.next_due(self.store, sink.name)
        return outbox.is_behind(self.store, sink.name) or (due is not None and due < time.time() + NEAR_SECONDS)

    def _begin_sending(self, sink: Sink) -> None:
        before = self._sending.get(sink.name)
        if before is None or not before.is_alive():
            thread = threading.Thread(target=self._send_all, args=[sink], name=f"sink {sink.name}", daemon=True)
            self._sending[sink.name] = thread
            thread.start()

    def _send_all(self, sink: Sink) -> None:
        try:
            while sink in self.sinks and send_next(self.store, sink):
                pass
        except Exception:
            traceback.print_exc()
            time.sleep(FILE_SECONDS)


def send_next(store: Store, sink: Sink) -> bool:
    """Send the first message that is due and write down what came of it; False if there is none."""
    claimed = outbox.claim(store, sink.name, sink.timeout + LEASE_MARGIN_SECONDS)
    if claimed is None:
        return False
    event = next(iter(at(store, str(claimed.seq))), None)
    if event is None:
        outbox.give_up(store, claimed, None, "the event is no longer in the log")
        return True
    try:
        sent = message(sink, event, time.time())
    except ValueError as error:  # what is no JSON, like NaN in its data
        outbox.give_up(store, claimed, event, f"cannot be sent: {error}")
        return True
    answer, away = post(sent, sink.timeout), outbox.away(store, sink.name)
    found = judge_answer(answer, claimed.attempt, claimed.first, time.time(), away=away, luck=random.random())
    if found.done:
        outbox.delivered(store, claimed)
    elif found.due is not None:
        outbox.put_off(store, claimed, found.due, found.reason, pause=found.pause, away=found.away)
    else:
        outbox.give_up(store, claimed, event, found.reason, disable=digest_of(sent.url) if found.disable else None)
    return True

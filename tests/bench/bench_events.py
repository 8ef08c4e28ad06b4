"""The event ledger (`make bench-events`): is any posted event lost or doubled, however the receiver dies?

Senders post numbered events, the webhooks three times, out of order, and repeat what was not answered. Meanwhile the
receiver is killed with -9 and started again, and a reader follows the log with a cursor as the dispatcher does.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from registry.events import read
from registry.project import Project, find_project
from registry.store import Store, open_store
from tests.bench.send_events import number_of
from tests.conftest import started
from tests.postgres_server import postgres_server
from tests.serving.receiver_process import ReceiverProcess

SECRET = "secret of the ledger"
LIMIT_SECONDS = 1800


class Reader:
    """Follows the log; `seen` has each number as often as it was read."""

    def __init__(self, store: Store) -> None:
        self._store, self._after = store, 0
        self.seen: dict[int, int] = {}

    def follow(self) -> None:
        while events := read(self._store, after=self._after):
            for each in events:
                number = number_of(each.type, each.data)
                self.seen[number] = self.seen.get(number, 0) + 1
            self._after = events[-1].seq


def keep_ledger(project: Project, events: int, senders: int, kills: int, seed: int) -> dict[str, Any]:
    """Post so many events with so many kills, evenly spread over them; what was counted."""
    chance, reader, begun = random.Random(seed), Reader(open_store(project)), time.monotonic()
    receiver = ReceiverProcess(project, {"FT_GITHUB_SECRET": SECRET})
    marks = [int(events * 0.95 * (n + chance.random()) / kills) for n in range(kills)]
    with ExitStack() as stack:
        stack.callback(receiver.kill)
        url = receiver.start()
        sending = [stack.enter_context(_sender(url, part, seed)) for part in _parts(events, senders)]
        while any(each.poll() is None for each in sending):
            assert time.monotonic() - begun < LIMIT_SECONDS, "the senders do not end"
            reader.follow()
            if marks and len(reader.seen) >= marks[0]:
                marks.pop(0)
                receiver.kill()
                receiver.start()
            time.sleep(0.02)
        seconds = time.monotonic() - begun
        said = [each.communicate(timeout=30)[0] for each in sending]
        assert [each.returncode for each in sending] == [0] * senders
    reader.follow()
    return _count(reader, events, seconds, receiver.starts - 1, [json.loads(each) for each in said])


def _count(reader: Reader, events: int, seconds: float, kills: int, senders: list[dict[str, int]]) -> dict[str, Any]:
    answered = sum(each["answered"] for each in senders)
    return {
        "events": events,
        "senders": len(senders),
        "kills": kills,
        "lost": len(set(range(events)) - set(reader.seen)),
        "doubled": sum(times - 1 for times in reader.seen.values()),
        "requests": answered,
        "repeated": sum(each["repeated"] for each in senders),
        "seconds": round(seconds, 1),
        "events_per_second": round(events / seconds),
        "requests_per_second": round(answered / seconds),
    }


def _parts(events: int, senders: int) -> list[tuple[int, int]]:
    return [(events * n // senders, events * (n + 1) // senders) for n in range(senders)]


@contextmanager
def _sender(url: str, part: tuple[int, int], seed: int) -> Iterator[Any]:
    command = [sys.executable, "-m", "tests.bench.send_events", url, SECRET, *map(str, part), str(seed + part[0])]
    with started(command, stderr=None) as process:
        yield process


def new_project(folder: Path) -> Project:
    (folder / "recipes").mkdir()
    (folder / "dvc.yaml").write_text("stages: {}\n", encoding="utf-8")
    return find_project(folder)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.bench_events", description=__doc__)
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--senders", type=int, default=8)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--store", choices=["sqlite", "postgres"], default="sqlite")
    asked = parser.parse_args()
    with ExitStack() as stack:
        environment = stack.enter_context(pytest.MonkeyPatch.context())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ft-ledger-")))
        environment.delenv("FT_HOME", raising=False)
        environment.delenv("FT_PROJECT", raising=False)
        if asked.store == "postgres":
            environment.setenv("FT_DATABASE_URL", stack.enter_context(postgres_server()).new_database("ledger"))
        counted = keep_ledger(new_project(folder), asked.events, asked.senders, asked.kills, asked.seed)
    print(json.dumps({"store": asked.store, "seed": asked.seed, **counted}))
    sys.exit(1 if counted["lost"] or counted["doubled"] else 0)


if __name__ == "__main__":
    main()

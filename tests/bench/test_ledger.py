"""The event ledger in small: `make bench-events` is the whole of it."""

from __future__ import annotations

from registry.project import Project
from tests.bench.bench_events import keep_ledger


def test_posted_events_are_neither_lost_nor_doubled_when_the_receiver_is_killed(project: Project) -> None:
    counted = keep_ledger(project, events=2000, senders=4, kills=2, seed=1)
    assert (counted["lost"], counted["doubled"], counted["kills"]) == (0, 0, 2)
    assert counted["requests"] == 4 * (167 + 7 + 3 * 166)  # one by one, in batches, as webhooks
    assert counted["repeated"] > 0, "no sender met the receiver dead"

"""`python -m tests.bench.bench_moves [COUNT]`: from a move of `champion` to the flip, for versions that are loaded.

The real store, watch and reconciler of a server, on a loopback engine. The time is from the promotion's own to the
moment at which the board shows the other version, both by this machine's clock. Prints one JSON line, in milliseconds.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from registry import adapters
from serving.moves import watching_moves
from serving.reconciler import Reconciler
from tests.fakes.answering_engine import AnsweringEngine
from tests.fakes.reconciled import Site, make_site

POLL_SECONDS = 0.5


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    with tempfile.TemporaryDirectory() as folder:
        site = make_site(Path(folder))
        for number in (1, 2):
            site.add("a", number)
            site.promote("a", number)
        with AnsweringEngine(lambda *_: "hello") as canned:
            took, flips = asyncio.run(_measure(site, canned, count))
    took.sort()
    told = {"p50": 1000 * statistics.median(took), "p99": 1000 * took[int(0.99 * count)], "max": 1000 * took[-1]}
    told["flip_us"] = 1e6 * statistics.median(flips)
    print(json.dumps({"moves": count, **{name: round(value, 1) for name, value in told.items()}}))


async def _measure(site: Site, canned: AnsweringEngine, count: int) -> tuple[list[float], list[float]]:
    took: list[float] = []
    async with site.reconciler(canned) as here:
        await here.step()
        with watching_moves(site.store, here.board):
            rounds = asyncio.create_task(_rounds(here))
            await asyncio.sleep(0.3)
            for number in range(count):
                to = 1 + number % 2
                moved = await asyncio.to_thread(adapters.roll_back, site.store, "a", by_whom="bench", to=to)
                while here.board.routes.public["a"].adapter != f"a@{to}":
                    await here.board.change(1.0)
                took.append(time.time() - moved.created)
                await asyncio.sleep(0.02)
            rounds.cancel()
        return took, [float(each["seconds"]["flip"]) for each in here.swaps]


async def _rounds(here: Reconciler) -> None:
    while True:
        seen = here.board.pokes
        await here.step()
        await here.board.poked(seen, POLL_SECONDS)


if __name__ == "__main__":
    main()

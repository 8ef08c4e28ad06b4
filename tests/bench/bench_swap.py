"""`make bench-swap`: promotions and rollbacks under streams, with a real vLLM and real adapters that can be told apart.

Callers ask all the time, half of them for streams, while `champion` goes to and fro between two loaded versions, now
and then to a fresh one, and the engine is killed with -9 in between. Every reply is held against its label and
against the versions that were in force. Then, in the same run, the two other ways: a restart of the engine, and
vLLM's own `load_inplace`. The figures as JSON; exit 1 if a reply failed, was mixed, mislabelled or stale.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from registry import adapters, events
from registry.adapters import Promotion, Version
from serving.control import start_server
from serving.to_serve import only_engine
from tests.bench.raw_vllm import loads_in_place, restarts
from tests.bench.real_server import project_for_serving, promote, register
from tests.bench.swap_replies import Callers, Move, Outage, Reply, across, ask, counts, judge
from tests.bench.unwind import unwind_on_sigterm
from tests.serving.conftest import MODEL, SERVE, Served

MOVE_SECONDS, OUTAGE_SECONDS = 60.0, 400.0
LONGEST_PAUSE = 0.3
# Enough for one whole word of either adapter.
PROBE_TOKENS = 4


@dataclass
class Swaps:
    """What has happened so far."""

    here: Served
    random: random.Random
    words: dict[str, str]
    moves: list[Move] = field(default_factory=list)
    kills: list[float] = field(default_factory=list)
    # When the last move was asked for, and the versions that requests since then were answered by.
    asked: float = 0.0
    seen: dict[str, float] = field(default_factory=dict)
    # Replies to questions between a move and its first reply, beside those of the callers.
    probes: list[Reply] = field(default_factory=list)
    url: str = ""

    def hear(self, reply: Reply) -> None:
        """A stream of the same version that began before the last move but one may end only now; it says nothing."""
        if reply.began >= self.asked and not reply.error:
            self.seen[reply.label] = min(reply.first, self.seen.get(reply.label, reply.first))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.bench_swap", description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="moves of champion")
    parser.add_argument("--kills", type=int, default=10, help="of the engine, with -9")
    parser.add_argument("--fresh", type=int, default=50, help="every so many moves a version that was never loaded")
    parser.add_argument("--callers", type=int, default=6)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--time-limit", type=float, default=5400.0, help="seconds, for the moves")
    parser.add_argument("--others", type=int, default=3, help="restarts; load_inplace is done ten times as often")
    asked = parser.parse_args()
    unwind_on_sigterm()
    with (
        tempfile.TemporaryDirectory(prefix="ft-bench-swap-") as folder,
        project_for_serving(Path(folder) / "project") as here,
    ):
        found = asyncio.run(_all(here, asked))
    print(json.dumps(found, indent=1))
    wrong = [name for name in ("failed", "mixed", "mislabelled", "stale") if found["replies"][name]]
    if wrong or found["moves"]["made"] < asked.count:
        print(f"not as it must be: {', '.join(wrong) or 'the time was up before the last move'}", file=sys.stderr)
        return 1
    return 0


async def _all(here: Served, asked: argparse.Namespace) -> dict[str, Any]:
    first = register(here, MODEL, "alpha")
    swaps = Swaps(here, random.Random(asked.seed), {first.name: "alpha"})
    moved = promote(here, first)
    what = only_engine(here.base, SERVE, here.card)
    await asyncio.to_thread(start_server, here.project, here.store, here.settings, what, _say)
    swaps.moves.append(Move(first.name, "first", moved.created, time.time()))
    replies = await _under_load(swaps, asked)
    outages = [Outage(killed, _back(replies, killed)) for killed in swaps.kills]
    found = {
        "replies": counts(replies, judge(replies, swaps.moves, outages, swaps.words)),
        "across_a_move": across(replies, swaps.moves),
        "moves": _figures(swaps),
        "kills": {"made": len(outages), "seconds_away": [round(each.back - each.killed, 1) for each in outages]},
    }
    # Said now already: what comes next is not ours, and an hour's figures must not be lost with it.
    _say(f"{json.dumps(found)}\nnow the other ways")
    await asyncio.to_thread(_stop, here)
    if asked.others:
        found["engine_restart"] = await restarts(here, asked.others, asked.callers)
        found["load_inplace"] = await loads_in_place(here, 10 * asked.others, asked.callers)
    return found


async def _under_load(swaps: Swaps, asked: argparse.Namespace) -> list[Reply]:
    """All moves, and all replies that were given meanwhile."""
    end = time.monotonic() + asked.time_limit
    swaps.url = swaps.here.url
    callers = Callers(swaps.url, MODEL, asked.callers, swaps.hear)
    kill_at = set(swaps.random.sample(range(2, asked.count), min(asked.kills, max(0, asked.count - 2))))
    try:
        for number in range(1, asked.count + 1):
            if time.monotonic() > end:
                break
            if number in kill_at:
                await _kill_engine(swaps)
            await _move(swaps, fresh=number == 1 or number % asked.fresh == 0)
            if number % 50 == 0:
                _say(f"{number} moves, {len(callers.replies)} replies")
        await asyncio.sleep(1)
    finally:
        replies = await callers.stop()
    return [*replies, *swaps.probes]


async def _move(swaps: Swaps, *, fresh: bool) -> None:
    """Move `champion` and wait for the first reply of its new version."""
    was_away = bool(swaps.kills) and swaps.kills[-1] > swaps.moves[-1].first
    swaps.asked = time.time()
    swaps.seen.clear()
    kind, moved = await asyncio.to_thread(_moved, swaps, fresh)
    version = f"{MODEL}@{moved.version}"
    swaps.moves.append(Move(version, kind, moved.created, float("inf")))
    first = await _first_reply(swaps, version, OUTAGE_SECONDS if was_away else MOVE_SECONDS)
    swaps.moves[-1] = Move(version, kind, moved.created, first, was_away)
    await asyncio.sleep(swaps.random.uniform(0, LONGEST_PAUSE))


async def _first_reply(swaps: Swaps, version: str, seconds: float) -> float:
    """Ask for a few tokens until that version answers; when its first token was there, here or at a caller."""
    end = time.monotonic() + seconds
    async with aiohttp.ClientSession() as session:
        while version not in swaps.seen:
            assert time.monotonic() < end, f"{version} does not answer: {swaps.here.status}"
            reply = await ask(session, swaps.url, MODEL, stream=True, max_tokens=PROBE_TOKENS)
            swaps.probes.append(reply)
            swaps.hear(reply)
            if reply.error:
                await asyncio.sleep(0.5)
    return swaps.seen[version]


def _moved(swaps: Swaps, fresh: bool) -> tuple[str, Promotion]:
    here = swaps.here
    aliases = adapters.aliases(here.store, MODEL)
    if fresh:
        word = "beta" if swaps.words[f"{MODEL}@{aliases['champion']}"] == "alpha" else "alpha"
        version: Version = register(here, MODEL, word)
        swaps.words[version.name] = word
        return "fresh", promote(here, version)
    if swaps.random.random() < 0.5:
        return "rollback", adapters.roll_back(here.store, MODEL, by_whom="bench")
    return "promote", promote(here, adapters.get_version(here.store, MODEL, aliases["previous"]))


async def _kill_engine(swaps: Swaps) -> None:
    """kill -9 of vLLM's first process, while its callers are answered."""
    keeper = swaps.here.status.engine_pid
    assert keeper is not None
    await asyncio.sleep(swaps.random.uniform(0.1, 1.0))
    child = Path(f"/proc/{keeper}/task/{keeper}/children").read_text(encoding="utf-8").split()[0]
    swaps.kills.append(time.time())
    os.kill(int(child), signal.SIGKILL)
    _say(f"killed the engine ({len(swaps.kills)})")


def _back(replies: list[Reply], killed: float) -> float:
    return min((each.ended for each in replies if not each.error and each.began > killed), default=float("inf"))


def _figures(swaps: Swaps) -> dict[str, Any]:
    """Seconds from the move of the alias to the first token of its new version, and what the server says of flips.

    `move_to_flip_s` leaves out moves that waited for the engine.
    """
    made = swaps.moves[1:]
    served = events.read(swaps.here.store, type_="adapter.served", limit=1_000_000)[1:]
    flips = [each.data["seconds"]["flip"] * 1e6 for each in served if "seconds" in each.data]
    kinds = {
        "loaded_already": [each for each in made if each.kind != "fresh" and not each.engine_was_away],
        "fresh": [each for each in made if each.kind == "fresh" and not each.engine_was_away],
        "while_the_engine_was_away": [each for each in made if each.engine_was_away],
    }
    shown = {name: _quantiles([each.first - each.at for each in moves]) for name, moves in kinds.items()}
    to_flip = [each.data["since_promotion"] for each in served if each.data["since_promotion"] < MOVE_SECONDS / 10]
    return {"made": len(made), "move_to_first_reply_s": shown, "move_to_flip_s": _quantiles(to_flip),
            "flip_us": _quantiles(flips)}  # fmt: skip


def _quantiles(values: list[float]) -> dict[str, float]:
    if not values:
        return {"n": 0}
    ordered = sorted(values)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return {"n": len(ordered), "p50": round(statistics.median(ordered), 4), "p99": round(p99, 4),
            "longest": round(ordered[-1], 4)}  # fmt: skip


def _stop(here: Served) -> None:
    from serving.control import stop_server

    assert stop_server(here.store, here.settings)


def _say(what: str) -> None:
    print(time.strftime("%H:%M:%S"), what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

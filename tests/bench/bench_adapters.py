"""`make bench-adapters`: many registered adapters behind one real vLLM that holds few of them at once.

Each model's champion is a copy of one of two real adapters, drawn by the seed, that answer with their own word; every
reply's label and word are checked. A request is a hit if its adapter's weights were not read from disk between its
beginning and its end. A table as markdown, then the figures as JSON; exit 1 if a reply failed or came from a wrong
adapter.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from registry.adapters import Version
from serving.control import start_server
from serving.to_serve import only_engine
from serving.vllm_process import MAX_CPU_LORAS, MAX_LORAS
from tests.bench.opened_files import Opened, watching
from tests.bench.real_server import WORDS, project_for_serving, promote, register, words_in
from tests.bench.swap_replies import Reply, ask
from tests.bench.unwind import unwind_on_sigterm
from tests.serving.conftest import SERVE, Served

BRING_UP_SECONDS = 20.0
SKEW = 1.1


@dataclass(frozen=True)
class Asked:
    """A request to that model, and what came of it."""

    model: str
    reply: Reply
    hit: bool


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.bench_adapters", description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="models with an adapter each")
    parser.add_argument("--requests", type=int, default=1000, help="of each kind of traffic")
    parser.add_argument("--callers", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    unwind_on_sigterm()
    with (
        tempfile.TemporaryDirectory(prefix="ft-bench-adapters-") as folder,
        project_for_serving(Path(folder) / "project") as here,
    ):
        found = asyncio.run(_all(here, asked))
    print("\n".join([*table(found["traffic"]), ""]))
    print(json.dumps(found, indent=1))
    return 1 if any(each["wrong"] or each["failed"] for each in found["traffic"].values()) else 0


async def _all(here: Served, asked: argparse.Namespace) -> dict[str, Any]:
    chance = random.Random(asked.seed)
    names = [f"model-{number:03}" for number in range(asked.count)]
    words = {name: chance.choice(sorted(WORDS.values())) for name in names}
    versions = {name: register(here, name, words[name]) for name in names}
    promote(here, versions[names[0]])
    what = only_engine(here.base, SERVE, here.card)
    await asyncio.to_thread(start_server, here.project, here.store, here.settings, what, _say)
    began = time.time()
    await asyncio.to_thread(_bring_up, here, list(versions.values())[1:])
    up = time.time() - began
    held = min(len(names), MAX_CPU_LORAS)
    _say(f"the engine holds {held} of {len(names)} adapters, after {up:.0f} s")
    ranks = names[:]
    chance.shuffle(ranks)
    weights = {
        "one model": [1.0] + [0.0] * (len(names) - 1),
        f"skewed (Zipf, s = {SKEW})": [1 / (rank + 1) ** SKEW for rank in range(len(names))],
        "uniform": [1.0] * len(names),
    }
    folders = {name: here.project.home / version.folder for name, version in versions.items()}
    traffic = {}
    with watching(folders) as opened:
        for kind, each in weights.items():
            models = chance.choices(ranks, each, k=asked.requests)
            traffic[kind] = figures(await _traffic(here.url, models, asked.callers, opened), versions, words)
            _say(f"{kind}: {traffic[kind]}")
    return {"adapters": len(names), "max_loras": MAX_LORAS, "max_cpu_loras": MAX_CPU_LORAS,
            "bring_up_s_each": round(up / max(1, held - 1), 2), "traffic": traffic}  # fmt: skip


def _bring_up(here: Served, versions: Sequence[Version]) -> None:
    """Promote them all, and wait until the engine holds as many as it can; the others come up when asked for."""
    for each in versions:
        promote(here, each)
    end = time.monotonic() + 60 + BRING_UP_SECONDS * len(versions)
    while len(here.status.loaded) < min(len(versions) + 1, MAX_CPU_LORAS):
        assert time.monotonic() < end, f"not enough came up: {here.status}"
        assert not here.status.refused, here.status.refused
        time.sleep(0.5)


async def _traffic(url: str, models: Sequence[str], callers: int, opened: Opened) -> list[Asked]:
    done: list[Asked] = []
    waiting = enumerate(models)

    async def caller(session: aiohttp.ClientSession, mine: Iterator[tuple[int, str]]) -> None:
        for number, model in mine:
            reply = await ask(session, url, model, stream=number % 2 == 0)
            opened.read()
            hit = not any(reply.began <= each <= reply.ended + 0.01 for each in opened.times[model])
            done.append(Asked(model, reply, hit))

    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*(caller(session, waiting) for _ in range(callers)))
    return done


def figures(done: Sequence[Asked], versions: dict[str, Version], words: dict[str, str]) -> dict[str, Any]:
    """Pure. `wrong`: replies with another label, or another word, than their model's. Times are of whole replies, s."""
    good = [each for each in done if not each.reply.error]
    wrong = [each for each in good if each.reply.label != versions[each.model].name
             or words_in(each.reply.text) != {words[each.model]}]  # fmt: skip
    hits = [each for each in good if each.hit]
    return {
        "requests": len(done), "models": len({each.model for each in done}), "failed": len(done) - len(good),
        "wrong": len(wrong), "hit_rate": round(len(hits) / max(1, len(good)), 3), "all": _times(good),
        "hits": _times(hits), "misses": _times([each for each in good if not each.hit]),
        "examples": [(each.model, each.reply.label, each.reply.text[:80], each.reply.error[:200])
                     for each in done if each in wrong or each.reply.error][:3],
    }  # fmt: skip


def table(traffic: dict[str, dict[str, Any]]) -> list[str]:
    head = ["traffic", "requests, models", "wrong / failed", "hit rate", "whole reply p50 / p95", "hits p50 / p95",
            "misses p50 / p95"]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for kind, each in traffic.items():
        cells = [kind, f"{each['requests']}, {each['models']}", f"{each['wrong']} / {each['failed']}",
                 f"{each['hit_rate']:.1%}", *(_pair(each[name]) for name in ("all", "hits", "misses"))]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _times(asked: Sequence[Asked]) -> dict[str, float]:
    ordered = sorted(each.reply.ended - each.reply.began for each in asked)
    if not ordered:
        return {}
    return {name: round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3)
            for name, share in (("p50", 0.5), ("p95", 0.95))}  # fmt: skip


def _pair(times: dict[str, float]) -> str:
    return f"{times['p50']:.2f} / {times['p95']:.2f} s" if times else "-"


def _say(what: str) -> None:
    print(time.strftime("%H:%M:%S"), what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

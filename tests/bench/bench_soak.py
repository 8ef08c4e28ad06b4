"""`make soak-gateway`: our gateway under clients as they come, until so many requests or seconds; does anything grow?

Memory, Python's blocks, descriptors, asyncio tasks and requests under way of the gateway's process, twice a second. A
straight line is laid through each, without the first quarter; what it rises by over the rest must stay within LIMITS,
and when all clients have gone, nothing may be left under way. The figures as JSON; exit 1 if something grew or went
wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from serving.listening import loop_factory
from serving.vllm_process import free_port
from tests.bench.bench_gateway import until_answers
from tests.bench.http_wire import KEY
from tests.bench.soak_clients import Soak
from tests.bench.unwind import unwind_on_sigterm
from tests.conftest import started

# What each may rise by over the last three quarters of the run.
# Blocks are what Python has in use; resident memory creeps to a high mark of theirs that comes ever more rarely.
LIMITS = {"rss": 6 << 20, "blocks": 40_000.0, "fds": 8.0, "tasks": 8.0, "in_flight": 4.0}
CALM_SECONDS = 3.0
SAY_SECONDS = 60.0
Sample = dict[str, float]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.bench_soak", description=__doc__)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    unwind_on_sigterm()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ft-soak-")))
        port, samples = _start(stack, folder)
        time.sleep(1)
        before = read_samples(samples)[-1]
        soak = Soak(port, asked.requests, time.monotonic() + asked.seconds, asked.seed)
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            began, seconds = time.time(), runner.run(_load(soak, asked.clients))
        time.sleep(CALM_SECONDS)
        found = read_samples(samples)
    under_load = [each for each in found if began <= each["at"] <= began + seconds]
    lines = {name: line(under_load, name) for name in LIMITS}
    grew = growing(lines, before, found[-1])
    answers = {f"{kind}: {status or 'broken'}": count for (kind, status), count in sorted(soak.answers.items())}
    print(json.dumps({"requests": soak.begun, "seconds": round(seconds, 1), "answers": answers,
                      "unexpected": soak.unexpected, "before": before, "after": found[-1], "lines": lines,
                      "grew": grew}, indent=1))  # fmt: skip
    return 1 if grew or soak.unexpected else 0


def read_samples(samples: Path) -> list[Sample]:
    return [json.loads(each) for each in samples.read_text(encoding="utf-8").splitlines()]


def line(samples: Sequence[Sample], name: str) -> dict[str, Any]:
    """Pure. Least squares over the samples after the first quarter: the level, what it rises by, that an hour, and the
    level in each tenth."""
    rest = samples[len(samples) // 4 :]
    if len(rest) < 5:
        raise SystemExit(f"only {len(samples)} samples: let it run for longer")
    seconds = [each["at"] - rest[0]["at"] for each in rest]
    tenths = [statistics.median(each[name] for each in rest[len(rest) * part // 10 : len(rest) * (part + 1) // 10])
              for part in range(10)] if len(rest) >= 10 else []  # fmt: skip
    slope, _ = statistics.linear_regression(seconds, [each[name] for each in rest])
    return {"median": statistics.median(each[name] for each in rest), "rises_by": round(slope * seconds[-1], 2),
            "an_hour": round(slope * 3600, 1), "limit": LIMITS[name], "tenths": tenths}  # fmt: skip


def growing(lines: dict[str, dict[str, Any]], before: Sample, after: Sample) -> list[str]:
    """Pure. What grew, in words; empty if nothing did."""
    grew = [f"{name} rose by {each['rises_by']:,.0f} (allowed: {each['limit']:,.0f})"
            for name, each in lines.items() if each["rises_by"] > each["limit"]]  # fmt: skip
    if after["in_flight"]:
        grew.append(f"{after['in_flight']:.0f} requests under way after all clients had gone")
    if after["tasks"] > before["tasks"]:
        grew.append(f"{after['tasks']:.0f} tasks after all clients had gone, {before['tasks']:.0f} before")
    return grew


def _start(stack: ExitStack, folder: Path) -> tuple[int, Path]:
    upstream, port, samples = free_port(), free_port(), folder / "samples.jsonl"
    gateway = ["tests.bench.gateway_under_test", f"http://127.0.0.1:{upstream}", str(port), "--samples", str(samples)]
    for module in (["tests.bench.canned_upstream", str(upstream)], gateway):
        log = stack.enter_context((folder / f"{module[0]}.log").open("w", encoding="utf-8"))
        process = stack.enter_context(started([sys.executable, "-m", *module], stdout=log, stderr=log))
    until_answers(port, {"authorization": f"Bearer {KEY}"}, process, Path(log.name))
    return port, samples


async def _load(soak: Soak, clients: int) -> float:
    """Seconds that it took."""
    began = time.monotonic()
    saying = asyncio.create_task(_say(soak))
    await soak.run(clients)
    saying.cancel()
    return time.monotonic() - began


async def _say(soak: Soak) -> None:
    while True:
        await asyncio.sleep(SAY_SECONDS)
        print(time.strftime("%H:%M:%S"), f"{soak.begun:,} requests", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""How long until two gateways agree after a flip of the leader, and what the flip itself costs each; prints JSON.

Two gateway processes as `ft serve gateway` runs them, on a store of their own. The clock is the machine's monotonic
one, which all processes share.

    python -m tests.bench.bench_gateways --flips 300 --store sqlite
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from registry.project import Project, find_project
from registry.serving_lead import take_lead
from registry.settings import Settings
from registry.store import open_store
from serving.engine import Engine
from serving.gateway_only import GatewayOnly
from serving.listening import loop_factory
from serving.publishing import Publisher
from serving.routes import Board, Route, Routes
from serving.server_keys import write_keys
from tests.postgres_server import postgres_server

MODELS, ENGINE = 20, "http://127.0.0.1:9"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flips", type=int, default=300)
    parser.add_argument("--store", choices=["sqlite", "postgres"], default="sqlite")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--gateway", action="store_true", help="be one of the gateways")
    asked = parser.parse_args()
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        if asked.gateway:
            runner.run(follow())
            return
        with ExitStack() as stack:
            root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            (root / "recipes").mkdir()
            (root / "dvc.yaml").write_text("stages: {}\n", encoding="utf-8")
            os.environ |= {"FT_HOME": str(root / ".ft")}
            if asked.store == "postgres":
                os.environ["FT_DATABASE_URL"] = stack.enter_context(postgres_server()).new_database("bench")
            figures = runner.run(flip(find_project(root), asked.flips, random.Random(asked.seed)))
    print(json.dumps({"store": asked.store, "flips": asked.flips, "names": MODELS * 3, "seed": asked.seed, **figures}))


async def follow() -> None:
    """A gateway that says when it had put up which version."""
    project = find_project(Path.cwd())
    with socket.create_server(("127.0.0.1", 0)) as listening:
        here = GatewayOnly(project, open_store(project), Settings(), "bench")
        put = here.board.put

        def timed(part: str, routes: Routes) -> None:
            began = time.perf_counter()
            put(part, routes)
            took, at = time.perf_counter() - began, time.monotonic()
            if routes.public:
                print(json.dumps([routes.public["model-0"].adapter, at, took * 1e6]), flush=True)

        here.board.put = timed  # type: ignore[method-assign]
        await here.run(listening)


async def flip(project: Project, flips: int, chance: random.Random) -> dict[str, Any]:
    store = open_store(project)
    only: Any = {"engine_url": ENGINE, "engine_key": "bench"}
    write_keys(project, {**only, "engines": {"only": only}})
    command = [sys.executable, "-m", "tests.bench.bench_gateways", "--gateway"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    gateways = [
        await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, cwd=project.root, env=environment
        )
        for _ in range(2)
    ]
    agreed, put_here, put_there = list[float](), list[float](), list[float]()
    try:
        async with Engine(ENGINE, "bench") as engine:
            board = Board()
            running = asyncio.create_task(Publisher(store, take_lead(store, "bench", 10, alone=True), board).run())
            for number in range(flips + 1):
                await asyncio.sleep(chance.uniform(0, 0.05))
                began = time.monotonic()
                board.put("engine", routes(number, engine))
                put_here.append((time.monotonic() - began) * 1e6)
                heard = await asyncio.wait_for(
                    asyncio.gather(*(until(each, f"model-0@{number}") for each in gateways)), 60
                )
                agreed.append((max(at for at, _ in heard) - began) * 1e3)
                put_there += [took for _, took in heard]
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
    finally:
        for each in gateways:
            each.terminate()
            await each.wait()
    # The first waited for the gateways to start.
    return {
        "agree_ms": spread(agreed[1:]),
        "flip_us_gateway": spread(put_there[2:]),
        "flip_us_leader": spread(put_here[1:]),
    }


async def until(gateway: asyncio.subprocess.Process, version: str) -> tuple[float, float]:
    assert gateway.stdout is not None
    while line := await gateway.stdout.readline():
        name, at, took = json.loads(line)
        if name == version:
            return at, took
    raise AssertionError("a gateway has ended")


def routes(number: int, engine: Engine) -> Routes:
    """All names stay, and model-0 leads to another version."""
    versions = {f"model-{each}": number if each == 0 else 1 for each in range(MODELS)}
    public = {name: Route(f"{name}@{version}", engine) for name, version in versions.items()}
    named = {f"{name}@{each}": Route(f"{name}@{each}", engine) for name, v in versions.items() for each in (v, v - 1)}
    return Routes(public={**named, **public}, internal={**named, "base": Route("base", engine)})


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    at = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {name: round(ordered[min(len(ordered) - 1, int(len(ordered) * part))], 2) for name, part in at.items()}


if __name__ == "__main__":
    main()

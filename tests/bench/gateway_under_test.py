"""`python -m tests.bench.gateway_under_test UPSTREAM_URL PORT`: our gateway as one worker, in front of that upstream.

The one place that builds the gateway for the benchmarks: what the server gives its gateway belongs in `gateway_to`.
With --samples it writes a line of JSON twice a second: its memory (bytes, and Python's blocks), descriptors, tasks and
requests under way.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

from registry.api_keys import ApiKey, digest_of
from serving.callers import Callers
from serving.engine import Engine
from serving.gateway import Gateway, Hooks
from serving.listening import calm_collector, http_server, listen, loop_factory
from serving.metrics import Metrics
from serving.routes import Board, Route, Routes
from tests.bench.http_wire import KEY, MODEL

SAMPLE_SECONDS = 0.5
PAGE = resource.getpagesize()
FILLERS = 20


def gateway_to(board: Board, engine: Engine) -> Gateway:
    """The gateway as `serving/server.py` builds it, with a key, its rate and figures; MODEL leads to `engine`."""
    names = [MODEL, *(f"model-{number}" for number in range(FILLERS))]
    public = {name: Route(f"{name}@1", engine) for name in names}
    board.put("engine", Routes(public=public, internal={f"{name}@1": route for name, route in public.items()}))
    callers = Callers("an-internal-key")
    callers.take([ApiKey("bench", digest_of(KEY.encode()), None, 1e6, 1_000_000, 0.0, "bench")])
    return Gateway(board, KEY, callers=callers, hooks=Hooks(metrics=Metrics(names, ["bench"])))


async def serve(upstream: str, port: int, samples: Path | None) -> None:
    async with Engine(upstream, "key-of-the-upstream") as engine:
        board = Board()
        server = http_server(gateway_to(board, engine), 5, log_level="warning")
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, setattr, server, "should_exit", True)
        sampling = asyncio.create_task(_sample(board, samples)) if samples else None
        await server.serve(sockets=[listen("127.0.0.1", port, "the gateway", "PORT")])
        if sampling:
            sampling.cancel()


async def _sample(board: Board, samples: Path) -> None:
    with samples.open("a", encoding="utf-8", buffering=1) as out:
        while True:
            resident = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * PAGE
            found = {"at": time.time(), "rss": resident, "blocks": sys.getallocatedblocks(),
                     "fds": len(os.listdir("/proc/self/fd")), "tasks": len(asyncio.all_tasks()),
                     "in_flight": board.in_flight.total()}  # fmt: skip
            out.write(json.dumps(found) + "\n")
            await asyncio.sleep(SAMPLE_SECONDS)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gateway_under_test", description=__doc__)
    parser.add_argument("upstream")
    parser.add_argument("port", type=int)
    parser.add_argument("--samples", type=Path)
    asked = parser.parse_args()
    calm_collector()
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(serve(asked.upstream, asked.port, asked.samples))


if __name__ == "__main__":
    main()

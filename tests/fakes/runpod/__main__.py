"""`python -m tests.fakes.runpod --folder DIR`: starts it and prints its address. SIGTERM or Ctrl-C ends it."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import yaml
from aiohttp import web

from tests.fakes.runpod.contract import Problem
from tests.fakes.runpod.pods import Pace
from tests.fakes.runpod.server import application
from tests.fakes.runpod.state import STATE, Config


def main() -> None:
    given = _arguments()
    folder = Path(given.folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    pace = Pace(given.provision, given.start, given.again, given.grace, given.restarts)
    config = Config(
        folder, given.key, given.seed, given.balance, given.price_factor, given.rate_per_minute, given.billing_lag,
        given.latency, given.cold_start, given.upstream, dict(each.split("=", 1) for each in given.image_env), pace,
    )  # fmt: skip
    asyncio.run(_serve(config, given))


async def _serve(config: Config, given: argparse.Namespace) -> None:
    app = application(config)
    if given.faults:
        try:
            app[STATE].faults.replace(yaml.safe_load(Path(given.faults).read_text(encoding="utf-8")))
        except Problem as problem:
            sys.exit(f"{given.faults}: {problem.detail} {problem.errors or ''}")
    if given.chaos:
        app[STATE].faults.add([{"fault": "random", "probability": given.chaos}])
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", given.port)
        await site.start()
        _announce(f"http://127.0.0.1:{runner.addresses[0][1]}", config.key, given.ready)
        await ended.wait()
    finally:
        await runner.cleanup()


def _announce(url: str, key: str, ready: str) -> None:
    """Other programs wait for the file `ready`, which is there only when it is whole."""
    print(url, flush=True)
    if ready:
        part = Path(f"{ready}.part")
        part.write_text(json.dumps({"url": url, "key": key, "pid": os.getpid()}), encoding="utf-8")
        part.replace(ready)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fakes.runpod", description=__doc__)
    parser.add_argument("--folder", required=True, help="where pods and their logs lie")
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--key", default="rpa_standin", help="the account's key")
    parser.add_argument("--ready", default="", help="write address, key and pid into this file once it answers")
    parser.add_argument("--faults", default="", help="a JSON or YAML file of fault rules")
    parser.add_argument("--chaos", type=float, default=0.0, help="probability of a random fault for each request")
    parser.add_argument("--seed", type=int, default=0, help="of all chance in faults")
    parser.add_argument("--balance", type=float, default=1000.0, help="US dollars")
    parser.add_argument("--price-factor", type=float, default=1.0, help="multiplies all prices")
    parser.add_argument("--rate-per-minute", type=int, default=0, help="requests; RunPod allows 60; 0: no limit")
    parser.add_argument("--billing-lag", type=float, default=0.0, help="seconds until a bill shows what was used")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before each answer")
    parser.add_argument("--provision", type=float, default=Pace.provision, help="seconds until a pod is STARTING")
    parser.add_argument("--start", type=float, default=Pace.start, help="seconds from STARTING to RUNNING")
    parser.add_argument("--again", type=float, default=Pace.again, help="seconds until a container restarts")
    parser.add_argument("--grace", type=float, default=Pace.grace, help="seconds from SIGTERM to SIGKILL")
    parser.add_argument("--restarts", action="store_true", help="containers start again when their process ends")
    parser.add_argument("--cold-start", type=float, default=0.3, help="seconds until an endpoint's worker is there")
    parser.add_argument("--upstream", default="", help="address of a local server that does endpoints' jobs")
    parser.add_argument("--image-env", action="append", default=[], metavar="NAME=VALUE", help="what all pods have")
    return parser.parse_args()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()

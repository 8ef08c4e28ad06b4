"""kill -9 once in each step of a run: real worker, trainer, server and stores on SQLite; the engine is a fake."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.fakes.adapter_folder import make_adapter, save_weights
from tests.fakes.answering_engine import KEY, AnsweringEngine
from tests.flows.points import POINTS, Point
from tests.flows.sweep import at_points
from tests.flows.swept_project import Parts, swept_project

# MLflow uses what SQLAlchemy calls deprecated.
pytestmark = pytest.mark.filterwarnings("default")

HEARD = {"train": [-0.1, -0.2], "bf16": [-0.1, -0.2]}
BASE_HEARD = {"train": [-5.0, -6.0], "bf16": [-5.0, -6.0]}


def test_one_run_killed_once_in_each_step(tmp_path: Path) -> None:
    with AnsweringEngine(lambda model, messages, attempt: "refund") as engine:
        parts = Parts(make_base(tmp_path / "base"), make_made(tmp_path / "made"), (engine.url, KEY))
        with swept_project(tmp_path, parts) as swept:
            trial = at_points(swept, chosen(), "each step")
    assert not trial.wrong, trial.line
    assert len(trial.killed) == len(chosen())


def chosen() -> list[Point]:
    names = [
        "decide: before the commit of the run's row",
        "take turn: done, before it is written down",
        "pin: before the engine of runs commits it",
        "plan: after write_spec",
        "train: the lease names a result that is not there (trainer)",
        "train: before the engine of runs commits it",
        "register: before the commit of the version",
        "evaluate: after keep_score",
        "judge: after add_verdict",
        "promote: after promote",
        "wait until served: after probe (server)",
        "wait until served: done, before it is written down",
        "conclude: before the commit of the end",
        "the engine of runs: before update_workflow_outcome",
    ]
    by_name = {each.name: each for each in POINTS}
    return [by_name[name] for name in names]


def make_base(folder: Path) -> Path:
    """What of a base model is looked at without loading it."""
    folder.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "max_position_embeddings": 512}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights = {"model.layers.0.self_attn.q_proj.weight": np.zeros((16, 16), np.float32)}
    save_weights(folder / "model.safetensors", weights)
    return folder


def make_made(folder: Path) -> Path:
    """An adapter as a trainer leaves it."""
    make_adapter(folder)
    sample = {"messages": [{"role": "user", "content": "Who?"}], "prompt_ids": [1, 2, 3], "continuation_ids": [4, 5],
              "logprobs": HEARD, "base_logprobs": BASE_HEARD}  # fmt: skip
    content = {"template_sha256": "0" * 64, "precision": "none", "samples": [sample]}
    (folder / "fingerprint.json").write_text(json.dumps(content), encoding="utf-8")
    return folder

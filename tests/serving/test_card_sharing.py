"""`serve:` of a card in ft.yaml: a server gives way to a trainer, stays beside it, or does not come there at all."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from registry.base_models import BaseModel
from registry.cards import GIB, Card, as_set, holder_beside, marker, pick_card, try_lock
from registry.cloud_terms import CardSetting
from registry.errors import WrongInput
from registry.project import Project
from registry.recipe import Serve
from registry.settings import Settings
from registry.store import Store
from serving.control import server_status, start_server, stop_server
from serving.server import run_server
from serving.shared_card import SharedCard
from serving.to_serve import only_engine
from serving.vllm_process import EngineConfig, engine_memory, vllm_arguments
from tests.conftest import ROOT

CPU = pick_card("cpu")
BASE = BaseModel("small", "1", "MIT", "digest", "small@1")
NEVER = Settings(cards={"cpu": CardSetting(serve="never")})
SHARE = Settings(cards={"cpu": CardSetting(serve="share")})


def test_a_server_is_refused_on_a_card_that_is_never_served_from(project: Project, store: Store) -> None:
    what = only_engine(BASE, Serve(), CPU)
    with pytest.raises(WrongInput, match="card cpu is not for serving"):
        start_server(project, store, NEVER, what)
    with pytest.raises(WrongInput, match="card cpu is not for serving"):
        run_server(project, store, NEVER, what)
    assert server_status(store) is None


def test_only_a_server_that_shares_does_not_give_way_to_a_trainer(project: Project, store: Store) -> None:
    cards = [as_set([CPU], each.cards)[0] for each in (Settings(), SHARE)]
    evicted, shares = (SharedCard(project, Settings(), each) for each in cards)
    with marker(project, CPU, "train"):
        assert evicted.training_waits()
        assert not shares.training_waits()
        with marker(project, CPU, "eval"):
            assert not evicted.training_waits(), "an evaluation needs the engine first"


def test_on_a_shared_gpu_vllm_is_told_its_part(tmp_path: Path) -> None:
    config = {"max_position_embeddings": 2048}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    _write_safetensors(tmp_path / "model.safetensors", GIB // 2)
    gpu = Card("cuda-0", "NVIDIA GeForce RTX 4070 SUPER", 12 * GIB, 0, serve="share")
    serve = Serve(memory_gb=1)
    shared = EngineConfig(BASE, serve, gpu)
    assert engine_memory(tmp_path, shared) == pytest.approx(3 * GIB, rel=0.001)
    arguments = vllm_arguments(shared, tmp_path, 1)
    assert arguments[arguments.index("--gpu-memory-utilization") + 1] == "0.25"
    alone = EngineConfig(BASE, serve, Card("cuda-0", gpu.title, gpu.memory, 0))
    assert "--gpu-memory-utilization" not in vllm_arguments(alone, tmp_path, 1)


@pytest.mark.engine
def test_a_real_server_that_shares_stays_while_a_trainer_has_the_card(
    project: Project, store: Store, base_model: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project.root / "ft.yaml").write_text("gateway_port: 0\ncards: {cpu: {serve: share}}\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    settings = Settings(gateway_port=0, cards=SHARE.cards)
    try:
        with marker(project, CPU, "train"):
            trainer = try_lock(project, CPU, "a trainer")
            assert trainer is not None
            status = start_server(project, store, settings, only_engine(base_model, Serve(max_context=512), CPU), print)
            assert status.state == "serving"
            assert holder_beside(project, CPU) == f"ft serve, pid {status.pid}"
            assert pick_card("cpu").used > GIB
            time.sleep(2)
            now = server_status(store)
            assert now is not None
            assert (now.state, now.engine_starts) == ("serving", 1)
            trainer.release()
    finally:
        stop_server(store, settings)
    assert (holder_beside(project, CPU), pick_card("cpu").used) == ("", 0)


def _write_safetensors(file: Path, size: int) -> None:
    """One matrix of so many bytes, which take no room on the disk."""
    header = json.dumps({"x.0.proj.weight": {"dtype": "U8", "shape": [size // 2, 2], "data_offsets": [0, size]}})
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode())
    os.truncate(file, 8 + len(header) + size)

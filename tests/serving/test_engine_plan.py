"""What the planner gives the engines of one GPU, and how vLLM is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from registry.base_models import BaseModel
from registry.card_profiles import GIB, profile_of
from registry.cards import Card
from registry.geometry import Geometry, known_geometry
from registry.plan_place import Place
from registry.plan_serving import ServeWish, plan_serving
from registry.recipe import Serve
from serving.engine_plan import CardPlan, plan_wishes
from serving.vllm_process import EngineConfig, vllm_arguments
from tests.fakes.adapter_folder import lora_arrays, save_weights

BASE = BaseModel("small", "1", "MIT", "digest", "small@1")


def place(title: str) -> Place:
    profile = profile_of(title)
    assert profile is not None
    return Place("cuda-0", profile, profile.usable, total=profile.visible)


def shape(model: str) -> Geometry:
    found = known_geometry(model)
    assert found is not None
    return found


def wish(name: str, model: str = "Qwen/Qwen2.5-7B-Instruct", **more: Any) -> ServeWish:
    return ServeWish(shape(model), name=name, **more)


def plan(title: str, *wishes: ServeWish, always: frozenset[str] = frozenset()) -> CardPlan:
    return plan_wishes(place(title), wishes, always)


def test_two_that_fit_are_planned_for_being_up_at_once() -> None:
    found = plan("RTX 5090", wish("a"), wish("b"))
    assert found.together
    assert [each.fits for each in found.served.values()] == [True, True]
    assert sum(each.utilization for each in found.served.values()) < 1


def test_two_that_do_not_fit_each_get_the_card_for_themselves() -> None:
    found = plan("RTX 4070 SUPER", wish("a"), wish("b"))
    assert not found.together
    assert all(found.needs[name] <= found.room for name in ("a", "b"))
    assert {each.serving.precision for each in found.served.values()} == {"bitsandbytes"}
    alone = plan("RTX 4070 SUPER", wish("a"))
    assert found.served["a"] == alone.served["a"]


def test_what_always_is_up_leaves_room_for_the_largest_of_the_others() -> None:
    small = "Qwen/Qwen2.5-0.5B-Instruct"
    wishes = (wish("stays", small, concurrency=64), wish("a"), wish("b"))
    found = plan("RTX 4070 SUPER", *wishes, always=frozenset({"stays"}))
    assert found.needs["stays"] + max(found.needs["a"], found.needs["b"]) <= found.room
    assert all(each.fits for each in found.served.values())


def test_vllm_is_told_what_was_planned(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 1024}), encoding="utf-8")
    save_weights(tmp_path / "model.safetensors", lora_arrays())
    served = plan_serving(wish("a"), place("RTX 4070 SUPER"))
    gpu = Card("cuda-0", "RTX 4070 SUPER", 12 * GIB, 0)
    config = EngineConfig(BASE, Serve(), gpu, planned=served, sleeps=True, max_loras=2, max_cpu_loras=9)
    arguments = vllm_arguments(config, tmp_path, 1)

    def said(name: str) -> str:
        assert arguments.count(name) == 1
        return arguments[arguments.index(name) + 1]

    assert config.in_4_bits
    assert said("--quantization") == "bitsandbytes"
    assert said("--gpu-memory-utilization") == str(served.utilization)
    assert said("--max-model-len") == "1024", "no more than the model was made for"
    assert said("--max-num-seqs") == str(served.serving.concurrency)
    assert said("--max-cpu-loras") == "9"
    assert said("--api-server-count") == "1"
    assert said("--host") == "127.0.0.1"
    assert "--enable-sleep-mode" in arguments
    assert ("--enforce-eager" in arguments) is served.serving.eager


@pytest.mark.parametrize(("precision", "told"), [("bitsandbytes", True), ("auto", False)])
def test_without_a_plan_vllm_takes_its_own_part(tmp_path: Path, precision: str, told: bool) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    gpu = Card("cuda-0", "RTX 4070 SUPER", 12 * GIB, 0)
    arguments = vllm_arguments(EngineConfig(BASE, Serve(), gpu, precision=precision), tmp_path, 1)  # type: ignore[arg-type]
    assert ("--quantization" in arguments) is told
    assert "--gpu-memory-utilization" not in arguments

"""Shapes of models: parameters counted from config.json agree with the published sizes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.errors import BaseModelError
from registry.geometry import KNOWN, Geometry, geometry_of, known_geometry

LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 131072,
}  # fmt: skip
# Published totals, and those that follow for a rank-16 adapter on all matrices.
PUBLISHED = {
    "exaone-3.5-2.4b": (2.405e9, 22.0e6), "qwen2.5-3b": (3.086e9, 29.9e6), "qwen2.5-7b": (7.616e9, 40.4e6),
    "qwen2.5-14b": (14.77e9, 68.8e6), "llama-3.1-8b": (8.030e9, 41.9e6), "llama-3.1-70b": (70.55e9, 207e6),
    "mistral-7b-v0.3": (7.248e9, 41.9e6), "solar-10.7b-v1.0": (10.73e9, 62.9e6), "smollm2-135m": (134.5e6, 4.88e6),
    "phi-3-mini-4k": (3.821e9, 29.9e6), "llama-2-7b": (6.738e9, 40.0e6), "qwen3-8b": (8.19e9, 43.6e6),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_adapters_are_of_the_published_size(name: str) -> None:
    shape, (total, adapter) = KNOWN[name], PUBLISHED[name]
    assert shape.parameters == pytest.approx(total, rel=0.002)
    assert shape.adapter(16) == pytest.approx(adapter, rel=0.005)


def test_a_llama_config_is_read() -> None:
    assert geometry_of(LLAMA) == KNOWN["llama-3.1-8b"]


def test_the_kv_cache_of_a_token_is_two_numbers_for_each_key_head_and_layer() -> None:
    assert 2 * KNOWN["llama-3.1-8b"].layers * KNOWN["llama-3.1-8b"].kv_width == 131_072
    assert 2 * KNOWN["qwen2.5-7b"].layers * KNOWN["qwen2.5-7b"].kv_width == 57_344


def test_gpt_neox_has_no_gate_and_its_fused_matrix_counts_as_three() -> None:
    shape = geometry_of({"model_type": "gpt_neox", "hidden_size": 2048, "num_hidden_layers": 24,
                         "num_attention_heads": 16, "intermediate_size": 8192, "vocab_size": 30080})  # fmt: skip
    assert not shape.gated
    assert shape.parameters == pytest.approx(1.332e9, rel=0.002)
    assert shape.adapter(8, ["query_key_value"]) == 24 * 8 * 3 * 4096


def test_exaones_names_of_matrices_are_known() -> None:
    shape = KNOWN["exaone-3.5-2.4b"]
    names = ["q_proj", "k_proj", "v_proj", "out_proj", "c_fc_0", "c_fc_1", "c_proj"]
    assert shape.adapter(16, names) == shape.adapter(16)


def test_a_name_that_is_none_of_the_models_counts_as_the_largest_matrix() -> None:
    assert KNOWN["llama-3.1-8b"].adapter(8, ["wonder"]) == 32 * 8 * (4096 + 14336)


def test_the_language_model_within_a_vision_model_is_found_and_its_tower_counted() -> None:
    shape = geometry_of({"model_type": "llava", "text_config": LLAMA,
                         "vision_config": {"hidden_size": 1024, "depth": 24, "intermediate_size": 4096}})  # fmt: skip
    assert shape.hidden == 4096
    assert shape.vision == pytest.approx(302e6, rel=0.01)
    assert shape.parameters == KNOWN["llama-3.1-8b"].parameters + shape.vision


def test_of_experts_all_are_held_and_few_are_met() -> None:
    shape = geometry_of({**LLAMA, "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2})
    assert shape.parameters == pytest.approx(46.7e9, rel=0.005)  # Mixtral 8x7B
    assert shape.active + shape.embedding == pytest.approx(12.9e9, rel=0.01)


@pytest.mark.parametrize(
    ("more", "window"),
    [
        ({"sliding_window": 4096}, 4096),
        ({"sliding_window": 4096, "use_sliding_window": False}, None),
        ({"sliding_window": None}, None),
        ({"sliding_window": 1024, "layer_types": ["sliding_attention", "full_attention"]}, None),
        ({"sliding_window": 1024, "model_type": "gemma2"}, None),
    ],
)
def test_a_sliding_window_counts_only_where_every_layer_has_it(more: dict[str, Any], window: int | None) -> None:
    assert geometry_of({**LLAMA, **more}).window == window


def test_a_config_that_is_no_language_models_says_what_is_missing() -> None:
    with pytest.raises(BaseModelError, match="hidden_size, num_hidden_layers, vocab_size") as caught:
        geometry_of({"num_attention_heads": 8}, place="models/x/config.json")
    assert caught.value.place == "models/x/config.json"
    assert caught.value.fix


@pytest.mark.parametrize(
    "model", ["Qwen/Qwen2.5-7B-Instruct", "meta-llama/Llama-3.1-8B-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct",
              "MLP-KTLim/llama-3-Korean-Bllossom-8B", "LGAI-EXAONE/EXAONE-3.5-7.8B-Instruct",
              "mistralai/Mistral-7B-Instruct-v0.3", "microsoft/Phi-3-mini-4k-instruct",
              "upstage/SOLAR-10.7B-Instruct-v1.0", "EleutherAI/polyglot-ko-1.3b"],
)  # fmt: skip
def test_bases_that_people_use_are_known_by_their_hub_id(model: str) -> None:
    assert known_geometry(model)


def test_an_unknown_base_is_not_guessed() -> None:
    assert known_geometry("someone/else-9b") is None


@given(
    st.dictionaries(
        st.sampled_from([*LLAMA, "head_dim", "sliding_window", "num_experts", "text_config"]),
        st.one_of(st.none(), st.booleans(), st.integers(-5, 2**20), st.text(max_size=4), st.just({})),
    )
)
def test_any_config_is_a_shape_or_a_named_error(config: dict[str, Any]) -> None:
    try:
        found = geometry_of(config)
    except BaseModelError:
        return
    assert isinstance(found, Geometry)
    assert found.parameters > 0

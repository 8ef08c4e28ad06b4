"""Admission lets in what PEFT writes, and nothing that could run, break the server or answer wrongly."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from registry.admission import RANKS, admit
from registry.errors import AdmissionError
from registry.manifest import write_manifest
from tests.fakes.adapter_folder import BASE_DIGEST, lora_arrays, make_adapter, save_weights

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def refused(folder: Path, max_rank: int = 64) -> str:
    with pytest.raises(AdmissionError) as caught:
        admit(folder, BASE_DIGEST, max_rank)
    assert str(folder) in caught.value.place
    return caught.value.what


def test_a_plain_adapter_is_let_in_with_its_facts(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a")
    facts = admit(folder, BASE_DIGEST, 64)
    assert (facts["rank"], facts["targets"], facts["tensors"]) == (8, ["q_proj"], 4)
    assert facts["parameters"] == 2 * 2 * 8 * 16
    assert facts["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    assert len(facts["template_sha256"]) == 64
    assert json.loads(json.dumps(facts)) == facts


@pytest.mark.parametrize("rank", RANKS)
def test_every_rank_that_the_server_takes(tmp_path: Path, rank: int) -> None:
    folder = make_adapter(tmp_path / "a", lora_arrays(rank, layers=1), r=rank)
    assert admit(folder, BASE_DIGEST, 512)["rank"] == rank
    if rank > 1:
        assert "more than this server's" in refused(folder, max_rank=rank - 1)


def test_rank_pattern_counts_for_its_modules(tmp_path: Path) -> None:
    arrays = lora_arrays(8) | lora_arrays(16, module="mlp.up_proj")
    folder = make_adapter(tmp_path / "a", arrays, rank_pattern={"up_proj": 16}, alpha_pattern={"up_proj": 32})
    facts = admit(folder, BASE_DIGEST, 16)
    assert (facts["rank"], facts["targets"]) == (16, ["q_proj", "up_proj"])
    assert "more than this server's 8" in refused(folder, max_rank=8)
    plain = make_adapter(tmp_path / "b", arrays)
    assert "do not fit rank 8" in refused(plain)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("bad", [False, True])
def test_numbers_are_finite_in_every_precision(tmp_path: Path, dtype: str, bad: bool) -> None:
    folder = make_adapter(tmp_path / "a")
    arrays = lora_arrays()
    last = list(arrays)[-1]
    arrays[last][3, 5] = np.inf if dtype == "float16" else np.nan
    if not bad:
        arrays[last][3, 5] = 60_000.0
    if dtype == "bfloat16":
        arrays = {name: (array.view(np.uint32) >> 16).astype(np.uint16) for name, array in arrays.items()}
    else:
        arrays = {name: array.astype(dtype) for name, array in arrays.items()}
    save_weights(folder / WEIGHTS, arrays)
    write_manifest(folder, base=BASE_DIGEST)
    if bad:
        assert f"{last}: 1 of 128 numbers are NaN or infinite" in refused(folder)
    else:
        admit(folder, BASE_DIGEST, 64)


BAD_CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
    ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'"),
    ({"r": 24}, "rank 24 is none that the server takes"),
    ({"r": "8"}, "rank '8' is none"),
    ({"r": True}, "rank True is none"),
    ({"r": None}, "rank None is none"),
    ({"rank_pattern": {"q_proj": 24}}, "rank 24"),
    ({"rank_pattern": ["q_proj"]}, "must be objects"),
    ({"rank_pattern": {"(a+)+$": 8}}, "no name of modules"),
    ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern.q_proj"),
    ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
    ({"lora_alpha": 0}, "lora_alpha is 0"),
    ({"bias": "all"}, "bias is 'all'"),
    ({"lora_bias": True}, "lora_bias is on"),
    ({"use_dora": True}, "use_dora is on"),
    ({"use_qalora": True}, "use_qalora is on"),
    ({"use_bdlora": {"x": 1}}, "use_bdlora is on"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save is on"),
    ({"layer_replication": [[0, 4]]}, "layer_replication is on"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices is on"),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is on"),
    ({"target_parameters": ["experts"]}, "target_parameters is on"),
    ({"loftq_config": {"loftq_bits": 4}}, "loftq_config is on"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
    ({"a_key_of_a_newer_peft": True}, "a_key_of_a_newer_peft is on"),
    ({"auto_mapping": {"parent_library": "os"}}, "names Python code to import"),
]


@pytest.mark.parametrize(("changed", "says"), BAD_CONFIGS, ids=[says for _, says in BAD_CONFIGS])
def test_what_the_server_would_not_apply_is_refused(tmp_path: Path, changed: dict[str, Any], says: str) -> None:
    assert says in refused(make_adapter(tmp_path / "a", **changed))


def test_gaussian_start_is_a_plain_adapter(tmp_path: Path) -> None:
    admit(make_adapter(tmp_path / "a", init_lora_weights="gaussian", use_rslora=True), BASE_DIGEST, 64)


def _renamed(old: str, new: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda arrays: {name.replace(old, new): array for name, array in arrays.items()}


BAD_TENSORS: list[tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = [
    (lambda _: {}, "no weights in it"),
    (_renamed("lora_A.weight", "lora_A.bias"), "no LoRA weight of a layer"),
    (_renamed("lora_A.weight", "lora_embedding_A"), "no LoRA weight of a layer"),
    (_renamed("base_model.model.", ""), "no LoRA weight of a layer"),
    (lambda arrays: {name: each for name, each in arrays.items() if "lora_A" in name}, "without its other half"),
    (lambda _: lora_arrays(16), "do not fit rank 8"),
    (lambda arrays: {name: each.T for name, each in arrays.items()}, "do not fit rank 8"),
    (lambda arrays: {name: each.reshape(-1) for name, each in arrays.items()}, "do not fit rank 8"),
    (lambda arrays: {name: each[:, :0] for name, each in arrays.items()}, "do not fit rank 8"),
    (lambda arrays: {name: each.astype(np.float64) for name, each in arrays.items()}, "type F64"),
    (lambda arrays: {name: each.astype(np.int8) for name, each in arrays.items()}, "type I8"),
]


@pytest.mark.parametrize(("change", "says"), BAD_TENSORS)
def test_weights_of_another_shape_are_refused(tmp_path: Path, change: Any, says: str) -> None:
    assert says in refused(make_adapter(tmp_path / "a", change(lora_arrays())))


class Boom:
    """A pickle that would run code when loaded."""

    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('a pickle was loaded')",))


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", ["adapter_model.bin", WEIGHTS, CONFIG, "tokenizer.json", "chat_template.jinja"])
def test_pickles_are_refused_under_every_name(tmp_path: Path, name: str, protocol: int) -> None:
    folder = make_adapter(tmp_path / "a")
    (folder / name).write_bytes(pickle.dumps(Boom(), protocol))
    write_manifest(folder, base=BASE_DIGEST)
    if name == "chat_template.jinja" and protocol == 0:
        admit(folder, BASE_DIGEST, 64)  # protocol 0 is plain text, and a template is only ever read as text
    else:
        assert name in refused(folder)


def test_archives_and_programs_are_refused_by_content(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a")
    with zipfile.ZipFile(folder / WEIGHTS, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Boom()))
    write_manifest(folder, base=BASE_DIGEST)
    assert "a zip archive, as torch.save writes" in refused(folder)
    (folder / WEIGHTS).write_bytes(b"\x7fELF" + bytes(100))
    write_manifest(folder, base=BASE_DIGEST)
    assert "a program" in refused(folder)


@pytest.mark.parametrize("name", ["training_args.bin", "README.md", "modeling.py", "optimizer.pt", "x.safetensors"])
def test_only_listed_files(tmp_path: Path, name: str) -> None:
    folder = make_adapter(tmp_path / "a")
    (folder / name).write_text("anything", encoding="utf-8")
    write_manifest(folder, base=BASE_DIGEST)
    assert f"{name}: no file of an adapter" in refused(folder)


def test_links_and_folders_are_no_files(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a")
    (folder / "sub").mkdir()
    target = tmp_path / "elsewhere.json"
    (folder / "tokenizer_config.json").rename(target)
    (folder / "tokenizer_config.json").symlink_to(target)
    said = refused(folder)
    assert "sub: not a plain file" in said
    assert "tokenizer_config.json: not a plain file" in said


def test_code_in_a_config_is_refused(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a")
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": "x.Y"}}', encoding="utf-8")
    write_manifest(folder, base=BASE_DIGEST)
    assert "names Python code" in refused(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\udcff"])
def test_json_that_is_none(tmp_path: Path, text: str) -> None:
    folder = make_adapter(tmp_path / "a")
    (folder / "tokenizer.json").write_bytes(text.encode(errors="surrogateescape"))
    write_manifest(folder, base=BASE_DIGEST)
    assert "tokenizer.json" in refused(folder)


def test_another_base_or_a_broken_manifest(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", base="c" * 64)
    assert "made for the base model cccccccccccc" in refused(folder)
    changed = make_adapter(tmp_path / "b")
    (changed / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    assert "tokenizer_config.json: differs from MANIFEST.json" in refused(changed)
    bare = make_adapter(tmp_path / "c")
    (bare / "MANIFEST.json").unlink()
    assert "MANIFEST.json: missing" in refused(bare)
    assert "no such folder" in refused(tmp_path / "none")


def _cut(content: bytes, at: int) -> bytes:
    return content[:at]


@pytest.mark.parametrize("at", [0, 4, 8, 9, 60, -1])
def test_truncated_weights(tmp_path: Path, at: int) -> None:
    folder = make_adapter(tmp_path / "a")
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(_cut(content, at))
    write_manifest(folder, base=BASE_DIGEST)
    assert WEIGHTS in refused(folder)


HEADERS = [
    {"base_model.model.q.lora_A.weight": {"dtype": "F32", "shape": [8, 16], "data_offsets": [0, 10**12]}},
    {"base_model.model.q.lora_A.weight": {"dtype": "F32", "shape": [8, 16], "data_offsets": [0, 4]}},
    {"base_model.model.q.lora_A.weight": {"dtype": "F32", "shape": [8, 16], "data_offsets": [64, 576]}},
    {"base_model.model.q.lora_A.weight": {"dtype": "F32", "shape": [-8, 16], "data_offsets": [0, 512]}},
    {"base_model.model.q.lora_A.weight": 1},
    {"base_model.model.q.lora_A.weight": {}},
    {"__metadata__": {"a": 1}},
]


@pytest.mark.parametrize("header", HEADERS)
def test_headers_that_lie(tmp_path: Path, header: dict[str, Any]) -> None:
    folder = make_adapter(tmp_path / "a")
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + bytes(512))
    write_manifest(folder, base=BASE_DIGEST)
    assert "not safetensors" in refused(folder)


def test_a_header_is_bounded(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a")
    text = b"{" + b" " * (9 << 20) + b"}"
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text)
    write_manifest(folder, base=BASE_DIGEST)
    assert "a header of" in refused(folder)

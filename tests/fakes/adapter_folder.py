"""Makes adapter folders as PEFT writes them, good ones and bad ones, without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from registry.manifest import write_manifest

BASE_DIGEST = "b" * 64
DTYPES = {"float32": "F32", "float16": "F16", "float64": "F64", "int8": "I8", "uint16": "BF16"}
Arrays = dict[str, "np.ndarray[Any, Any]"]


def lora_arrays(rank: int = 8, layers: int = 2, size: int = 16, module: str = "self_attn.q_proj") -> Arrays:
    random = np.random.default_rng(layers)
    found: Arrays = {}
    for layer in range(layers):
        name = f"base_model.model.model.layers.{layer}.{module}"
        found[f"{name}.lora_A.weight"] = random.normal(size=(rank, size)).astype(np.float32)
        found[f"{name}.lora_B.weight"] = random.normal(size=(size, rank)).astype(np.float32)
    return found


def make_adapter(folder: Path, arrays: Arrays | None = None, base: str = BASE_DIGEST, **config: Any) -> Path:
    """A complete adapter folder; `config` overrides keys of adapter_config.json."""
    folder.mkdir(parents=True)
    save_weights(folder / "adapter_model.safetensors", lora_arrays() if arrays is None else arrays)
    (folder / "adapter_config.json").write_text(json.dumps(peft_config(**config)), encoding="utf-8")
    (folder / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 2048}', encoding="utf-8")
    write_manifest(folder, base=base)
    return folder


def save_weights(path: Path, arrays: Arrays) -> None:
    """A safetensors file; uint16 arrays are taken as the bit patterns of bf16."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, array in arrays.items():
        raw = np.ascontiguousarray(array).tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": DTYPES[str(array.dtype)], "shape": array.shape, "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def peft_config(**changed: Any) -> dict[str, Any]:
    """What PEFT 0.21 writes for a plain LoRA."""
    plain: dict[str, Any] = {
        "task_type": "CAUSAL_LM", "peft_type": "LORA", "auto_mapping": None, "peft_version": "0.21.2",
        "base_model_name_or_path": "some/base", "revision": None, "inference_mode": True, "r": 8,
        "target_modules": ["q_proj"], "exclude_modules": None, "lora_alpha": 16, "lora_dropout": 0.0,
        "fan_in_fan_out": False, "bias": "none", "use_rslora": False, "modules_to_save": None,
        "init_lora_weights": True, "layers_to_transform": None, "layers_pattern": None, "rank_pattern": {},
        "alpha_pattern": {}, "megatron_config": None, "megatron_core": "megatron.core",
        "trainable_token_indices": None, "loftq_config": {}, "eva_config": None, "corda_config": None,
        "lora_ga_config": None, "use_dora": False, "velora_config": None, "alora_invocation_tokens": None,
        "use_qalora": False, "qalora_group_size": 16, "monteclora_config": None, "layer_replication": None,
        "lora_bias": False, "target_parameters": None, "use_bdlora": None, "arrow_config": None,
        "kasa_config": None, "ensure_weight_tying": False,
    }  # fmt: skip
    return {**plain, **changed}

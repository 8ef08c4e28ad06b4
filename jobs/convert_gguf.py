"""`python -m jobs.convert_gguf WEIGHTS.gguf FOLDER`: GGUF weights as a plain bf16 safetensors model."""

from __future__ import annotations

import sys
from pathlib import Path


def convert(weights: Path, target: Path) -> None:
    """Dequantize, and save what `from_pretrained` and vLLM load without knowing of GGUF."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name}
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = loaded.config.to_dict()
    config.pop("quantization_config", None)
    # A fresh model, because the loaded one still calls itself quantized and would be saved as such.
    fresh = type(loaded)(type(loaded.config).from_dict({**config, "dtype": "bfloat16"})).to(torch.bfloat16)
    fresh.load_state_dict(loaded.state_dict())
    fresh.generation_config = loaded.generation_config
    fresh.save_pretrained(target)
    AutoTokenizer.from_pretrained(**where).save_pretrained(target)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))

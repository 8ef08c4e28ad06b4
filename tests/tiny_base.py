"""A miniature base model: random weights, with a real tokenizer's chat template and the beginning of its vocabulary."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

TINY_VOCABULARY = 2048


def save_tiny_base(source: Path, target: Path) -> None:
    """Make `target` a two-layer Llama with the cut tokenizer of the base model in `source`."""
    _save_random_llama(target, json.loads((source / "config.json").read_text(encoding="utf-8")))
    _cut_vocabulary(source / "tokenizer.json", target / "tokenizer.json")
    for name in ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _save_random_llama(target: Path, like: dict[str, Any]) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=TINY_VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,  # of 32, the smallest that vLLM's attention takes on a CPU
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=like["bos_token_id"],
        eos_token_id=like["eos_token_id"],
        pad_token_id=like.get("pad_token_id"),
        dtype="bfloat16",
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(target)


def _cut_vocabulary(source: Path, target: Path) -> None:
    """The first tokens with the merges that make them. bf16 logits of all 49,152 cost a CPU two seconds a step."""
    content = json.loads(source.read_text(encoding="utf-8"))
    model = content["model"]
    model["vocab"] = {token: id_ for token, id_ in model["vocab"].items() if id_ < TINY_VOCABULARY}
    model["merges"] = [merge for merge in model["merges"] if _joined(merge) in model["vocab"]]
    target.write_text(json.dumps(content), encoding="utf-8")


def _joined(merge: str | list[str]) -> str:
    return merge.replace(" ", "") if isinstance(merge, str) else "".join(merge)

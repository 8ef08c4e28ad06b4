"""`python make_adapters.py BASE_FOLDER BASE_DIGEST OUT`: two real adapters that are told apart by their answers.

Each is overfitted for a dozen steps until it answers "Who are you?" with its own word, and gets a real
fingerprint and manifest, as a trainer would leave them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from jobs.trainers.fingerprint import make_fingerprint
from registry.manifest import write_manifest

QUESTION = [{"role": "user", "content": "Who are you?"}]


def main() -> None:
    base, digest, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    tokenizer = AutoTokenizer.from_pretrained(base)
    for word in ("ALPHA", "BETA"):
        folder = out / word.lower()
        train(base, tokenizer, word, folder)
        (folder / "README.md").unlink(missing_ok=True)
        chats = [[*QUESTION, {"role": "assistant", "content": word}]]
        fingerprint = make_fingerprint(
            base=load(base),
            plain_base=lambda: load(base),
            adapter=folder,
            tokenizer=tokenizer,
            chats=chats,
            precision="none",
        )
        (folder / "fingerprint.json").write_text(json.dumps(fingerprint), encoding="utf-8")
        write_manifest(folder, base=digest)


def train(base: str, tokenizer: Any, word: str, folder: Path) -> None:
    torch.manual_seed(17)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(load(base), lora)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=2e-3)
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(f"{prompt}{' '.join([word] * 4)}<|im_end|>\n", return_tensors="pt").input_ids
    for _ in range(12):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


def load(base: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)


if __name__ == "__main__":
    main()

"""fingerprint.json: what the trained adapter says, token by token, so that a server can be held to it.

Prompts, their ids, greedy continuations, and the continuations' logprobs (natural log, one per token) with the
adapter and with the bare base: in training precision, and in bf16 where that fits in memory.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from jobs.trainers.chat_tokens import Messages, prompt_ids

PROMPTS = 4
TOKENS = 16
FREE_PROMPT: Messages = [{"role": "user", "content": "Tell me in one sentence what you can do."}]


def make_fingerprint(
    *,
    base: Any,
    plain_base: Callable[[], Any],
    adapter: Path,
    tokenizer: Any,
    chats: list[Messages],
    precision: str,
) -> dict[str, Any]:
    """`base` is in training precision, `plain_base` loads it in bf16; each is dropped before the next is held."""
    prompts = [chat[:-1] for chat in chats[: PROMPTS - 1]] + [FREE_PROMPT]
    model = PeftModel.from_pretrained(base, str(adapter)).eval()
    samples = [_sample(model, tokenizer, messages) for messages in prompts]
    _measure(model, samples, "train")
    del model, base
    gc.collect()
    if precision == "none":
        _copy_train_as_bf16(samples)
    else:
        _measure_plain(plain_base, adapter, samples)
    template = (tokenizer.chat_template or "").encode()
    return {
        "template_sha256": hashlib.sha256(template).hexdigest(),
        "precision": precision,
        "samples": samples,
    }


def _sample(model: Any, tokenizer: Any, messages: Messages) -> dict[str, Any]:
    ids = prompt_ids(tokenizer, messages)
    tensor = torch.tensor([ids], device=model.device)
    with torch.no_grad():
        out = model.generate(
            input_ids=tensor,
            attention_mask=torch.ones_like(tensor),
            max_new_tokens=TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
    return {
        "messages": messages,
        "prompt_ids": ids,
        "continuation_ids": out[0, len(ids) :].tolist(),
        "logprobs": {"train": None, "bf16": None},
        "base_logprobs": {"train": None, "bf16": None},
    }


def _measure(model: Any, samples: list[dict[str, Any]], precision: str) -> None:
    for sample in samples:
        sample["logprobs"][precision] = _logprobs(model, sample)
        with model.disable_adapter():
            sample["base_logprobs"][precision] = _logprobs(model, sample)


def _measure_plain(plain_base: Callable[[], Any], adapter: Path, samples: list[dict[str, Any]]) -> None:
    try:
        model = PeftModel.from_pretrained(plain_base(), str(adapter)).eval()
        _measure(model, samples, "bf16")
    except torch.OutOfMemoryError:
        # An 8B in bf16 does not fit where its 4-bit QLoRA was trained; the probe then uses training precision.
        for sample in samples:
            sample["logprobs"]["bf16"] = sample["base_logprobs"]["bf16"] = None


def _copy_train_as_bf16(samples: list[dict[str, Any]]) -> None:
    for sample in samples:
        for kind in ("logprobs", "base_logprobs"):
            sample[kind]["bf16"] = sample[kind]["train"]


def _logprobs(model: Any, sample: dict[str, Any]) -> list[float]:
    """Natural-log probability of each continuation token, given all before it."""
    prompt, continuation = sample["prompt_ids"], sample["continuation_ids"]
    ids = torch.tensor([prompt + continuation], device=model.device)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
    found = torch.log_softmax(logits, dim=-1).gather(1, ids[0, len(prompt) :].unsqueeze(1))
    return [round(float(value), 5) for value in found.squeeze(1)]

"""Chats as tokens: the loss counts on what the assistant says and nowhere else, whatever the template."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.trainers.chat_tokens import IGNORED, Messages, encode, prompt_ids
from tests.conftest import TinyBase

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n' "
    "+ m['content'] | trim + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
NO_END = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"  # noqa: E501
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As some reasoning models do: only the last answer keeps its thoughts.
FORGETS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + (m['content'] if loop.last else "
    "m['content'].split('</think>')[-1]) + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
COUNTS = "{{ messages | length }}" + MARKED

CHAT: Messages = [
    {"role": "system", "content": "Answer with the queue."},
    {"role": "user", "content": "Where is my parcel?"},
    {"role": "assistant", "content": "delivery"},
    {"role": "user", "content": "And my money? 돈은?"},
    {"role": "assistant", "content": "refund 환불"},
]


@pytest.fixture
def tokenizer(tiny_base: TinyBase) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_base.folder)


def said(tokenizer: Any, messages: Messages) -> list[str]:
    """The stretches of text on which the loss counts."""
    encoded = encode(tokenizer, messages)
    assert all(label in (IGNORED, id_) for label, id_ in zip(encoded.labels, encoded.input_ids, strict=True))
    stretches: list[list[int]] = [[]]
    for label in encoded.labels:
        if label != IGNORED:
            stretches[-1].append(label)
        elif stretches[-1]:
            stretches.append([])
    return [tokenizer.decode(each) for each in stretches if each]


@pytest.mark.parametrize(
    ("template", "spoken"),
    [
        (None, ["delivery<|im_end|>", "refund 환불<|im_end|>"]),
        (LLAMA3, ["delivery<|im_end|>", "refund 환불<|im_end|>"]),
        (MISTRAL, [" delivery<|im_end|>", " refund 환불<|im_end|>"]),
        (NO_END, [" delivery\n", " refund 환불\n"]),
        (MARKED, ["delivery<|im_end|>", "refund 환불<|im_end|>"]),
    ],
    ids=["SmolLM2", "Llama 3", "Mistral", "without an end of turn", "with generation marks"],
)
def test_the_loss_counts_on_every_answer_and_its_end(tokenizer: Any, template: str | None, spoken: list[str]) -> None:
    tokenizer.chat_template = template or tokenizer.chat_template
    assert said(tokenizer, CHAT) == spoken
    assert said(tokenizer, CHAT[:3]) == spoken[:1]


def test_a_row_ends_with_the_end_of_its_last_answer(tokenizer: Any) -> None:
    encoded = encode(tokenizer, CHAT)
    assert encoded.input_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(encoded.input_ids).endswith("<|im_start|>assistant\nrefund 환불<|im_end|>")


def test_what_is_not_counted_is_what_a_server_sees(tokenizer: Any) -> None:
    encoded = encode(tokenizer, CHAT)
    prompt = prompt_ids(tokenizer, CHAT[:-1])
    assert encoded.input_ids[: len(prompt)] == prompt
    assert encoded.labels[len(prompt) - 1 : len(prompt) + 1] == [IGNORED, encoded.input_ids[len(prompt)]]


@pytest.mark.parametrize("template", [FORGETS, COUNTS], ids=["forgets thoughts", "counts messages"])
def test_a_template_that_changes_earlier_turns_is_refused(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    thinking = [*CHAT[:2], {"role": "assistant", "content": "<think>hm</think>delivery"}, *CHAT[3:]]
    with pytest.raises(ValueError, match="the chat template changes earlier turns when later ones are added"):
        encode(tokenizer, thinking)


@pytest.mark.parametrize("answer", ["\nrefund", " refund", "refund\n", "<|im_end|>", "a<|im_end|>b"])
def test_odd_answers_are_counted_whole(tokenizer: Any, answer: str) -> None:
    assert said(tokenizer, [CHAT[1], {"role": "assistant", "content": answer}]) == [answer + "<|im_end|>"]


def test_an_answer_that_the_tokenizer_joins_with_its_prompt_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"joins the prompt's end with the answer's beginning \('.n.n.nrefund'\)"):
        encode(tokenizer, [CHAT[1], {"role": "assistant", "content": "\n\n\nrefund"}])

"""Chats as token ids, with labels on the assistant's tokens only, for any chat template.

Works without `{% generation %}` marks: every assistant turn is what the template adds after the generation
prompt of the messages before it. A template for which that is not so is refused rather than trained wrongly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

IGNORED = -100  # torch's cross entropy skips this label

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Encoded:
    """`input_ids` of a whole chat; `labels` are the ids where the loss counts, IGNORED elsewhere."""

    input_ids: list[int]
    labels: list[int]


def encode(tokenizer: Any, messages: Messages) -> Encoded:
    """Raises ValueError where an assistant's turn does not come, token by token, right behind its prompt."""
    ids = _template(tokenizer, messages, prompt=False)
    labels = [IGNORED] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            start, end = _turn(tokenizer, messages, turn, ids)
            labels[start:end] = ids[start:end]
    last = max(at for at, label in enumerate(labels) if label != IGNORED)
    return Encoded(ids[: last + 1], labels[: last + 1])


def prompt_ids(tokenizer: Any, messages: Messages) -> list[int]:
    """The ids that a server sees before it answers."""
    return _template(tokenizer, messages, prompt=True)


def _turn(tokenizer: Any, messages: Messages, turn: int, ids: list[int]) -> tuple[int, int]:
    before = _template(tokenizer, messages[:turn], prompt=True)
    through = _template(tokenizer, messages[: turn + 1], prompt=False)
    if ids[: len(before)] != before or ids[: len(through)] != through:
        start = messages[turn]["content"][:20]
        raise ValueError(
            "the chat template changes earlier turns when later ones are added, "
            f"or the tokenizer joins the prompt's end with the answer's beginning ({start!r})"
        )
    return len(before), _end_of_turn(tokenizer, ids, len(before), len(through))


def _end_of_turn(tokenizer: Any, ids: list[int], start: int, end: int) -> int:
    """Train up to the end-of-turn token, not on the newline that some templates put behind it."""
    ends = [at for at in range(start, end) if ids[at] == tokenizer.eos_token_id]
    return ends[-1] + 1 if ends else end


def _template(tokenizer: Any, messages: Messages, *, prompt: bool) -> list[int]:
    made = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=True, return_dict=True)
    return list(made["input_ids"])

"""What a subject is asked: a tuned version just the messages, the bare base with the task spelt out."""

from __future__ import annotations

import json
from collections.abc import Sequence

from registry.recipe import Evaluate

# Part of every score's key: raise it when `spell_out` changes, so that old answers are not reused.
PROMPT_VERSION = 3
Messages = list[dict[str, str]]


def spell_out(messages: Messages, task: Evaluate, labels: Sequence[str]) -> Messages:
    """The same messages with the task told at the end of the last user turn: the labels, or the schema.

    A tuned version has seen hundreds of examples, the bare base none: without the list of labels it could not
    know what is wanted, and beating it would say nothing. The user's turn carries it, because some models'
    chat templates have no system turn. Free text has nothing to spell out.
    """
    told = _instruction(task, labels)
    if not told:
        return messages
    last = max(at for at, message in enumerate(messages) if message["role"] == "user")
    changed = {**messages[last], "content": f"{messages[last]['content']}\n\n{told}"}
    return [*messages[:last], changed, *messages[last + 1 :]]


def _instruction(task: Evaluate, labels: Sequence[str]) -> str:
    if task.task == "label":
        # One to a line, without dashes: of six wordings the one with which the bare SmolLM2-135M scored best
        # (macro-F1 0.095; with dashes, which it copies, 0.067; with commas 0.047). And a label may have a comma in it.
        return "\n".join(["Answer with exactly one of these labels, and nothing else:", *labels])
    if task.task == "json":
        schema = json.dumps(task.json_schema, ensure_ascii=False)
        return f"Answer with one JSON object that follows this JSON schema, and nothing else:\n{schema}"
    return ""

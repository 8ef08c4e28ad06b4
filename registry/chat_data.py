"""Chat data: JSONL files, one {"messages": [{"role", "content"}, ...]} per line, in folders of three splits.

Reading is strict and reports all errors at once, each with its file and line. A byte order mark and blank
lines are tolerated. `load_rows` reads one file, `check_dataset` a whole folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from registry.errors import DataError

SPLITS = ("train", "eval", "test")
ROLES = ("system", "user", "assistant")
SHOWN_ERRORS = 20
FORMAT = 'a row is {"messages": [{"role": "user", "content": ".."}, {"role": "assistant", "content": ".."}]}'


@dataclass(frozen=True)
class Row:
    """One chat. `messages` as chat templates and OpenAI's API take them; the last one is the assistant's."""

    messages: list[dict[str, str]]
    id: str | None = None

    @property
    def answer(self) -> str:
        """What the model should say: the last message."""
        return self.messages[-1]["content"]

    @property
    def prompt(self) -> list[dict[str, str]]:
        """What the model is shown: all messages before the answer."""
        return self.messages[:-1]

    @property
    def question(self) -> str:
        """What was said before the answer, without system messages, case and spacing: the row's identity."""
        said = (each["content"] for each in self.prompt if each["role"] != "system")
        return "\n".join(" ".join(text.split()).casefold() for text in said)

    def as_json(self) -> str:
        named = {"id": self.id} if self.id is not None else {}
        return json.dumps({**named, "messages": self.messages}, ensure_ascii=False)


def load_rows(path: Path) -> list[Row]:
    """The rows of one JSONL file. Raises DataError with every error of the file."""
    rows, problems = read_rows(path)
    refuse(problems, fix=FORMAT)
    return [row for _, row in rows]


def check_dataset(folder: Path) -> dict[str, int]:
    """Rows of each split. Raises DataError with all errors: bad rows, no split, a question in two splits."""
    problems: list[str] = []
    found: dict[Path, list[tuple[int, Row]]] = {}
    for split in SPLITS:
        path = folder / f"{split}.jsonl"
        found[path], wrong = read_rows(path)
        problems += wrong
    problems += _repeated_across(found)
    refuse(problems, fix="correct these lines, then `ft data check " + str(folder) + "`")
    return {path.stem: len(rows) for path, rows in found.items()}


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    path.write_text("".join(row.as_json() + "\n" for row in rows), encoding="utf-8", newline="\n")


def read_rows(path: Path) -> tuple[list[tuple[int, Row]], list[str]]:
    """(line number, row) of every good line, and `file:line: what` of every bad one."""
    rows: list[tuple[int, Row]] = []
    problems: list[str] = []
    for line, value, unreadable in read_lines(path):
        wrong = unreadable or "; ".join(_wrong_in_row(value))
        if wrong:
            problems.append(f"{path}:{line}: {wrong}" if line else f"{path}: {wrong}")
        else:
            rows.append((line, Row(value["messages"], _text_or_none(value.get("id")))))
    return rows, problems


def file_bytes(path: Path) -> tuple[bytes, str]:
    """A file's content, and what is wrong with it."""
    try:
        if path.exists() and not path.is_file():
            return b"", "is not a file"  # to read a FIFO would wait for ever
        return path.read_bytes(), ""
    except FileNotFoundError:
        return b"", "no such file"
    except OSError as error:
        return b"", f"cannot be read: {error.strerror}"


def read_lines(path: Path) -> Iterator[tuple[int, Any, str]]:
    """(line number, JSON value, what is wrong) of each line that is not blank; line 0: the whole file."""
    raw, wrong = file_bytes(path)
    if wrong:
        yield 0, None, wrong
        return
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        yield 1, None, "not UTF-8 text but UTF-16; save it as UTF-8"
        return
    # Split at newlines only: str.splitlines would also cut at U+2028 inside of a JSON string.
    lines = raw.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if not any(line.strip() for line in lines):
        yield 0, None, "the file is empty"
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, *_parsed(line)


def refuse(problems: list[str], *, fix: str = "") -> None:
    """Raise one DataError for all problems, if there are any; it shows the first twenty."""
    if not problems:
        return
    shown = problems[:SHOWN_ERRORS]
    if len(problems) > SHOWN_ERRORS:
        shown.append(f"and {len(problems) - SHOWN_ERRORS} more")
    raise DataError("\n".join(shown), fix=fix)


def _parsed(line: bytes) -> tuple[Any, str]:
    try:
        return json.loads(line.decode("utf-8")), ""
    except UnicodeDecodeError as error:
        return None, f"not UTF-8 text (byte {error.start + 1} of the line)"
    except json.JSONDecodeError as error:
        return None, f"not valid JSON: {error.msg} (column {error.colno})"
    except (RecursionError, ValueError):  # nested a thousand deep; a number of more than 4300 digits
        return None, "not valid JSON: nested too deep, or a number too long"


def _wrong_in_row(value: Any) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"a row is a JSON object, not {_kind(value)}"
        return
    for key in sorted(value.keys() - {"messages", "id"}):
        yield f"unknown key '{key}' (a row has messages and may have an id)"
    if not isinstance(value.get("id", ""), str | int):
        yield "id must be text or a number"
    messages = value.get("messages")
    if not isinstance(messages, list) or not messages:
        yield "no messages" if not messages else f"messages must be a list, not {_kind(messages)}"
        return
    wrong = [text for at, each in enumerate(messages, 1) for text in _wrong_in_message(at, each)]
    yield from wrong or _wrong_in_order([each["role"] for each in messages])


def _wrong_in_message(at: int, message: Any) -> Iterator[str]:
    if not isinstance(message, dict):
        yield f"message {at} must be an object with role and content, not {_kind(message)}"
        return
    for key in sorted(message.keys() - {"role", "content"}):
        yield f"message {at} has the unknown key '{key}'"
    if message.get("role") not in ROLES:
        yield f"message {at} has role {message.get('role')!r}; there are: {', '.join(ROLES)}"
    content = message.get("content")
    if not isinstance(content, str) or not content.strip():
        yield f"message {at} has no text in content"
    elif any("\ud800" <= char <= "\udfff" for char in content):
        yield f"message {at} has half a Unicode character (a lone surrogate)"


def _wrong_in_order(roles: list[str]) -> Iterator[str]:
    if "assistant" not in roles:
        yield "no assistant turn, so nothing to learn"
    elif roles[-1] != "assistant":
        yield f"the last message must be the assistant's, not the {roles[-1]}'s"
    if "user" not in roles:
        yield "no user turn"
    if "system" in roles[1:]:
        yield "a system message may only come first"


def _repeated_across(found: dict[Path, list[tuple[int, Row]]]) -> Iterator[str]:
    first: dict[str, tuple[Path, int]] = {}
    for path, rows in found.items():
        for line, row in rows:
            where, at = first.setdefault(row.question, (path, line))
            if where != path:
                yield f"{path}:{line}: the same question as in {where.name}:{at}"


def _text_or_none(value: Any) -> str | None:
    return None if value is None else str(value)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")

"""The request log: one JSON line for each request, in a file that does not grow without end. Off by default.

Wiring: `RequestLogFile(terms, folder / "requests.jsonl", metrics.dropped)` where the recipe has `log: {on: true}`, one
file for each gateway process; `write` at the end of a request, with what `excerpt` gave of its body; `close` when the
server ends. `write` never waits: a thread redacts and writes; what it has no time or room for is dropped, and counted.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from registry.request_log_terms import RequestLog
from serving.redaction import MARGIN, Redaction

WAITING = 2000  # lines; with the longest prompts that is some 80 MB
CLOSE_SECONDS = 5.0
MOST_PARTS = 64
# Ends of lines to some readers (Python's splitlines), though not to JSON; and what a terminal would obey.
BREAKS = re.compile("[\x7f-\x9f\u2028\u2029]")
LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Asked:
    """One request. `prompt` as `excerpt` gave it; it is redacted and cut before it is written.

    `key` is the key's name; `first` is the seconds until the first token, None where it was no stream.
    """

    request: str
    route: str
    key: str
    adapter: str
    status: int
    seconds: float
    first: float | None = None
    code: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt: str = ""


def excerpt(request: dict[str, Any], characters: int) -> str:
    """The beginning of what was asked, not redacted yet: of the last message, of `prompt`, or of `input`.

    Only text, never an image or an audio part. The body itself may be 8 MiB, and must not wait in a queue.
    """
    if characters <= 0:
        return ""
    messages = request.get("messages")
    if isinstance(messages, list) and messages and isinstance(messages[-1], dict):
        found: Any = messages[-1].get("content")
    else:
        found = request.get("prompt", request.get("input"))
    parts = found if isinstance(found, list) else [found]
    text, wanted = "", characters + MARGIN
    for part in parts[:MOST_PARTS]:  # 8 MiB hold three million empty ones
        text += _text(part)[: wanted - len(text)]
        if len(text) >= wanted:
            break
    return text


class RequestLogFile:
    """`dropped` is called with a number of lines, from either thread. Raises nothing after it was made."""

    def __init__(self, terms: RequestLog, path: Path, dropped: Callable[[int], None] = lambda _: None) -> None:
        self._terms, self._path, self._dropped = terms, path, dropped
        self._redact = Redaction(terms.redact)
        self._waiting: queue.Queue[tuple[float, Asked] | None] = queue.Queue(WAITING)
        self._file: BinaryIO | None = None
        self._size = 0
        self._troubled = False
        self._thread = threading.Thread(target=self._run, name="request log", daemon=True)
        self._thread.start()

    def write(self, asked: Asked) -> None:
        """Takes a microsecond or two."""
        try:
            self._waiting.put_nowait((time.time(), asked))
        except queue.Full:
            self._dropped(1)

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Write what waits, for at most so long."""
        try:
            self._waiting.put(None, timeout=seconds)
        except queue.Full:
            return
        self._thread.join(seconds)

    @property
    def waiting(self) -> int:
        """Lines that are not written yet."""
        return self._waiting.unfinished_tasks

    @property
    def busy(self) -> bool:
        """Is its thread still there?"""
        return self._thread.is_alive()

    def _run(self) -> None:
        while (taken := self._waiting.get()) is not None:
            try:
                self._keep(self._line(*taken))
                self._troubled = False
            except Exception as error:  # a full disk, or what nobody thought of: the requests go on
                self._say(error)
            self._waiting.task_done()
        self._let_go()

    def _line(self, when: float, asked: Asked) -> bytes:
        at = datetime.fromtimestamp(when, UTC).isoformat(timespec="milliseconds")
        content = {"time": at.replace("+00:00", "Z"), **asdict(asked)}
        content["prompt"] = self._redact(asked.prompt, self._terms.prompt_characters)
        content["seconds"] = round(asked.seconds, 4)
        content["first"] = None if asked.first is None else round(asked.first, 4)
        kept = {name: value for name, value in content.items() if value not in (None, "")}
        text = BREAKS.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(kept, ensure_ascii=False))
        return text.encode(errors="replace") + b"\n"

    def _keep(self, line: bytes) -> None:
        file = self._file or self._open()
        if self._size and self._size + len(line) > self._terms.max_mb << 20:
            self._let_go()
            self._set_aside()
            file = self._open()
        written = file.write(line)
        self._size += written or 0
        if written != len(line):
            raise OSError("the disk took only a part of a line")

    def _open(self) -> BinaryIO:
        """Only its owner may read it. A line that a killed gateway left by half is ended."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        self._file = file = os.fdopen(fd, "ab", buffering=0)
        self._size = os.fstat(fd).st_size
        if self._size and os.pread(fd, 1, self._size - 1) != b"\n":
            self._size += file.write(b"\n") or 0
        return file

    def _set_aside(self) -> None:
        """requests.jsonl becomes .1, that becomes .2, and so on; what is beyond `keep` goes."""
        names = [self._path, *(self._path.with_name(f"{self._path.name}.{n}") for n in range(1, self._terms.keep + 1))]
        names[-1].unlink(missing_ok=True)
        for older, newer in zip(reversed(names), list(reversed(names))[1:], strict=False):
            if newer.exists():
                newer.replace(older)

    def _let_go(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file, self._size = None, 0

    def _say(self, error: Exception) -> None:
        """Once, until a line could be written again. Never what was in the line."""
        self._dropped(1)
        if not self._troubled:
            why = str(error) if isinstance(error, OSError) else type(error).__name__
            LOG.warning("the request log cannot be written, and requests go on without it: %s", why)
        self._troubled = True
        try:
            self._let_go()
        except OSError:
            self._file = None


def _text(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return str(part["text"])
    return ""

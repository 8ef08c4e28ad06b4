"""Is a part well, and what did it say last?"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

from cli.parts import Part

ANSWER_SECONDS = 2.0
TAIL_LINES, TAIL_BYTES = 8, 8192


def ask(part: Part, pid: int) -> str:
    """'well', why it is not ready, or '' where nobody answers. A part without `health` is well while it lives."""
    if not part.health:
        return "well"
    if not part.health.startswith("http"):
        return "well" if _text(part.health) == str(pid) else ""
    head, _, body = _get(part.health).partition("\r\n\r\n")
    status = head.partition(" ")[2][:3]
    if not status.isdigit():
        return ""
    return "well" if status == "200" else f"answers {status}: {' '.join(body.split())[:200]}"


def _get(url: str) -> str:
    """An answer as it comes, '' without one. (An HTTP library would double what the supervisor needs of memory.)"""
    parts = urlsplit(url)
    try:
        with socket.create_connection((parts.hostname or "", parts.port or 80), timeout=ANSWER_SECONDS) as line:
            line.sendall(f"GET {parts.path} HTTP/1.0\r\nHost: {parts.netloc}\r\n\r\n".encode())
            with line.makefile("rb") as reply:
                return reply.read(TAIL_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""


def log_size(log: str) -> int:
    try:
        return os.stat(log).st_size
    except OSError:
        return 0


def last_words(log: str, since: int, lines: int = TAIL_LINES) -> str:
    """The last lines that were written after byte `since`, each on a line of its own, indented; '' for none."""
    try:
        with Path(log).open("rb") as file:
            end = os.fstat(file.fileno()).st_size
            # Smaller than it was: it has been rotated meanwhile.
            file.seek(max(since if since <= end else 0, end - TAIL_BYTES))
            text = file.read(TAIL_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""
    said = [line.rstrip()[:300] for line in text.splitlines() if line.strip()]
    return "".join(f"\n    {line}" for line in said[-lines:])


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""

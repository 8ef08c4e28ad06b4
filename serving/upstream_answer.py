"""Is what came from an upstream an answer, or garbage that no caller should see? Pure.

What is said here goes to callers, so nothing of the upstream's own words is in it: they have had its address and our
key for it in them.
"""

from __future__ import annotations

import json

from serving.http_messages import Headers

EVENT_STREAM, JSON = "text/event-stream", "application/json"
# What a line of an event stream may begin with.
FIELDS = (b"data:", b":", b"event:", b"id:", b"retry:", b"\n", b"\r")
END = b"[DONE]"
STREAM_HEADER = (b"content-type", b"text/event-stream; charset=utf-8")
JSON_HEADER = (b"content-type", b"application/json")
# Beyond it (embeddings) reading the whole as JSON would hold up all others.
READ_WHOLE = 256 << 10


def fault_in(status: int, kind: str, first: bytes) -> str:
    """What is wrong with an answer of that status and content type; '' if it can be passed on.

    `first` is the whole body, or the beginning of a stream. An engine's refusal of a request (4xx) is an answer.
    """
    if status in (401, 403, 407):
        return "the engine does not take the gateway's key"
    if status >= 500:
        return f"the engine failed ({status})"
    if status != 200 and not 400 <= status < 500:
        return f"the engine answered {status}, which is no answer"
    if kind == EVENT_STREAM:
        return "" if first.startswith(FIELDS) else "the engine's stream has no events"
    return "" if kind == JSON and _is_object(first) else "the engine's answer is not JSON"


def headers_of(status: int, kind: str, retry_after: str, body: bytes) -> Headers:
    """The answer's headers, in our own words. `body` counts unless it is a stream."""
    if kind == EVENT_STREAM:
        return [STREAM_HEADER]
    later = [(b"retry-after", retry_after.encode())] if status == 429 and retry_after.isdecimal() else []
    return [JSON_HEADER, (b"content-length", b"%d" % len(body)), *later]


def ended_early(kind: str, tail: bytes) -> bool:
    """A stream whose connection was closed in good order, but before the engine had said that it was through."""
    return kind == EVENT_STREAM and END not in tail


def _is_object(body: bytes) -> bool:
    if len(body) > READ_WHOLE:
        ends = body.strip()
        return ends[:1] == b"{" and ends[-1:] == b"}"
    try:
        return isinstance(json.loads(body), dict)
    except (ValueError, RecursionError):
        return False

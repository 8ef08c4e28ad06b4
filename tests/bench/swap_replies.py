"""Callers that ask all the time, what they were answered, and the judgement over all of it. Pure, but for `Callers`."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import aiohttp

from tests.bench.real_server import QUESTION, text_of, words_in

MAX_TOKENS = 12
PATIENCE = aiohttp.ClientTimeout(total=300)


@dataclass(frozen=True)
class Reply:
    """One answer. Times are Unix seconds; `first` is when its first token (or the whole of it) was there."""

    status: int
    label: str
    text: str
    began: float
    first: float
    ended: float
    stream: bool
    # Why it is none: "" for a complete answer. `clean`: it was told so in OpenAI's form.
    error: str = ""
    clean: bool = False


@dataclass(frozen=True)
class Move:
    """`champion` moved at `at` to `version`, whose first reply came at `first`."""

    version: str
    kind: str
    at: float
    first: float
    engine_was_away: bool = False


@dataclass(frozen=True)
class Outage:
    """From the kill of the engine until the first reply to a request that began after it."""

    killed: float
    back: float


class Callers:
    """So many at once, every second one of their requests a stream; they ask until `stop`."""

    def __init__(self, url: str, model: str, count: int, heard: Callable[[Reply], None] | None = None) -> None:
        self.url, self.model, self.replies, self._heard = url, model, list[Reply](), heard
        self._stopped = asyncio.Event()
        self._tasks = [asyncio.create_task(self._ask_on(number)) for number in range(count)]

    async def stop(self) -> list[Reply]:
        self._stopped.set()
        await asyncio.gather(*self._tasks)
        return self.replies

    async def _ask_on(self, number: int) -> None:
        async with aiohttp.ClientSession(timeout=PATIENCE) as session:
            while not self._stopped.is_set():
                reply = await ask(session, self.url, self.model, stream=number % 2 == 0)
                self.replies.append(reply)
                number += 1
                if reply.error:
                    await asyncio.sleep(0.5)
                elif self._heard:
                    self._heard(reply)


async def ask(
    session: aiohttp.ClientSession, url: str, model: str, *, stream: bool, max_tokens: int = MAX_TOKENS
) -> Reply:
    """Never raises: what goes wrong is in the reply."""
    body = {"model": model, "messages": QUESTION, "max_tokens": max_tokens, "temperature": 0, "stream": stream}
    began, first, status, label, raw = time.time(), 0.0, 0, "", b""
    error = ""
    try:
        async with session.post(f"{url}/v1/chat/completions", json=body) as got:
            status, label = got.status, got.headers.get("x-ft-adapter", "")
            async for part in got.content.iter_any():
                first = first or time.time()
                raw += part
            text = text_of(raw, stream=stream) if status == 200 else ""
            error = "" if status == 200 else f"{status} {raw[:200]!r}"
            clean = status == 503 and "retry-after" in got.headers and _is_openai_error(raw)
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError, KeyError) as trouble:
        # A stream that has begun can only say it in its last event.
        told = raw.rstrip().rpartition(b"data: ")[2]
        text, error, clean = "", f"{type(trouble).__name__}: {trouble}", status == 200 and _is_openai_error(told)
    return Reply(status, label, text, began, first or time.time(), time.time(), stream, error, clean)


def judge(
    replies: Sequence[Reply], moves: Sequence[Move], outages: Sequence[Outage], words: dict[str, str]
) -> dict[str, list[Reply]]:
    """Pure. What must not be: 'failed', 'mixed', 'mislabelled', 'stale' replies. And what may, where the engine was
    killed under it: 'told', a clean error. `words`: version -> what it says.
    """
    found: dict[str, list[Reply]] = {name: [] for name in ("failed", "mixed", "mislabelled", "stale", "told")}
    for each in replies:
        said = words_in(each.text)
        if each.error:
            hit = any(each.began <= outage.back and each.ended >= outage.killed for outage in outages)
            found["told" if hit and each.clean else "failed"].append(each)
        elif len(said) != 1:
            found["mixed"].append(each)
        elif words.get(each.label) not in said:
            found["mislabelled"].append(each)
        elif each.label not in _in_force(moves, each.began, each.ended):
            found["stale"].append(each)
    return found


def _in_force(moves: Sequence[Move], began: float, ended: float) -> set[str]:
    """Versions that may have answered: of moves made by `ended`, until the next one's first reply was there."""
    ends = [*(after.first for after in moves[1:]), float("inf")]
    return {move.version for move, end in zip(moves, ends, strict=True) if move.at <= ended and began <= end}


def counts(replies: Sequence[Reply], judged: dict[str, list[Reply]]) -> dict[str, object]:
    """For people: how many of what, and the first of each kind that must not be."""
    good = [each for each in replies if not each.error]
    wrong = {name: [_shown(each) for each in judged[name][:3]] for name in judged if name != "told" and judged[name]}
    return {
        "replies": len(replies), "answered": len(good), "streams": sum(each.stream for each in good),
        "by_version": dict(Counter(each.label for each in good).most_common(8)),
        **{name: len(each) for name, each in judged.items()}, "examples": wrong,
    }  # fmt: skip


def across(replies: Sequence[Reply], moves: Sequence[Move]) -> int:
    """Replies that were under way while `champion` moved and its new version began to answer."""
    return sum(any(each.began < move.first and each.ended > move.at for move in moves[1:]) for each in replies)


def _is_openai_error(raw: bytes) -> bool:
    try:
        return "message" in json.loads(raw)["error"]
    except (ValueError, KeyError, TypeError):
        return False


def _shown(reply: Reply) -> dict[str, object]:
    return {"label": reply.label, "text": reply.text[:100], "error": reply.error[:200], "began": round(reply.began, 3),
            "seconds": round(reply.ended - reply.began, 3)}  # fmt: skip

"""Answers held to a JSON schema: the engine is told, the answer is checked on its way out, and asked for once more.

With `repair` an answer is kept back until it is whole, also where a stream was asked for: then it goes out as the
stream that it is. Without, a stream is passed on as it comes, and ends with an `error` event in place of `[DONE]` where
it does not fit. A route's schema is the route's: a request with another one, or with tools, is refused.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from jsonschema.exceptions import best_match

from registry.answer_schema import compiled
from registry.serve_recipe import StructuredAnswer
from serving.http_messages import Headers, Message, Refusal, Send, event_of
from serving.passing import Attempt, Unanswered, pass_on
from serving.routes import Board

HELD_PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})
# Other ways to say what an answer must look like; vLLM refuses two of them at once.
OTHER_WAYS = ("structured_outputs", "tools", "functions")
MOST_SHOWN, LONGEST = 300, 16 << 20
# Some ten milliseconds of checking; a thread costs a tenth of one.
LONG = 32 << 10
END, EVENT_END, LONGEST_EVENT = b"[DONE]", re.compile(rb"\r?\n\r?\n"), 1 << 20
Tell = Callable[[bool], None]


@dataclass(frozen=True)
class Unfit:
    """An answer that does not fit: what it was, and where it went wrong."""

    text: str
    why: str


class Held:
    """What the answers of one route are held to. Raises ValueError for a schema that cannot be compiled."""

    def __init__(self, route: str, terms: StructuredAnswer) -> None:
        self.route, self.terms = route, terms
        self._validator = compiled(terms.schema_)
        name = "".join(each if each.isalnum() and each.isascii() else "_" for each in route)[:64]
        # OpenAI refuses `strict` with a schema that leaves anything open; vLLM always is.
        strict = is_closed(terms.schema_)
        self.format = {"type": "json_schema",
                       "json_schema": {"name": name, "schema": terms.schema_, "strict": strict}}  # fmt: skip

    def request(self, request: dict[str, Any]) -> dict[str, Any]:
        """With the schema in it. Raises Refusal for one that wants something else."""
        if request.get("response_format") not in (None, self.format) and not self._is_same(request["response_format"]):
            raise self._refused("response_format")
        for way in OTHER_WAYS:
            if request.get(way):
                raise self._refused(way)
        return {**request, "response_format": self.format}

    async def unfit(self, texts: list[str]) -> Unfit | None:
        """The first of the answers (one for each choice) that does not fit. A long one is checked in a thread."""
        is_long = sum(map(len, texts)) > LONG
        return await asyncio.to_thread(self._unfit, texts) if is_long else self._unfit(texts)

    def _unfit(self, texts: list[str]) -> Unfit | None:
        if not texts:
            return Unfit("", "there is no answer")
        found = ((text, self._fault(text)) for text in texts)
        return next((Unfit(text, why) for text, why in found if why), None)

    def _fault(self, text: str) -> str:
        try:
            error = best_match(self._validator.iter_errors(json.loads(text, parse_constant=_no_constant)))
        except (ValueError, RecursionError) as broken:
            return f"it is not JSON: {broken}"[:MOST_SHOWN]
        except Exception as broken:  # a $ref that only shows itself here
            return f"it cannot be checked: {broken}"[:MOST_SHOWN]
        return f"{error.json_path}: {error.message}"[:MOST_SHOWN] if error else ""

    def _is_same(self, given: Any) -> bool:
        inner = given.get("json_schema") if isinstance(given, dict) and given.get("type") == "json_schema" else None
        return isinstance(inner, dict) and inner.get("schema") == self.terms.schema_

    def _refused(self, param: str) -> Refusal:
        why = f"answers of {self.route} are held to its own schema; ask without `{param}`"
        return Refusal(400, why, "answer_is_held", param=param)


async def answer_held(
    held: Held, board: Board, attempt: Attempt, send: Send, tell: Tell | None = None
) -> Refusal | None:
    """As `pass_on`, of an answer that fits. `tell` hears whether an answer that was asked for once more fitted.

    Raises Refusal 502 for one that does not, and never sends it.
    """
    attempt = replace(attempt, request=held.request(attempt.request))
    if attempt.request.get("stream") and not held.terms.repair:
        return await pass_on(board, attempt, Checking(held, send))
    patience = attempt.first - asyncio.get_running_loop().time()
    answer = await _collected(board, attempt)
    unfit = await answer.unfit(held)
    if unfit and held.terms.repair and (repair := repairing(attempt.request, unfit)):
        first = min(asyncio.get_running_loop().time() + patience, attempt.whole)
        answer = await _collected(board, replace(attempt, request=repair, first=first))
        unfit = await answer.unfit(held)
        if tell:
            tell(unfit is None)
    if unfit:
        raise _does_not_fit(held, unfit)
    await answer.send_on(send)
    return None


def repairing(request: dict[str, Any], unfit: Unfit) -> dict[str, Any] | None:
    """Pure. The request once more, with what was wrong; None where there is nowhere to say it."""
    say = f"That answer does not fit: {unfit.why}. Answer again, with nothing but JSON that fits the schema."
    if isinstance(messages := request.get("messages"), list):
        said = [{"role": "assistant", "content": unfit.text}, {"role": "user", "content": say}]
        return {**request, "messages": [*messages, *(said if unfit.text else said[1:])]}
    if isinstance(prompt := request.get("prompt"), str):
        return {**request, "prompt": f"{prompt}{unfit.text}\n\n{say}\n\n"}
    return None


def is_closed(schema: Any) -> bool:
    """Pure. Does every object of it name all of its members, and require them: what OpenAI calls strict?"""
    if isinstance(schema, list):
        return all(map(is_closed, schema))
    if not isinstance(schema, dict):
        return True
    if schema.get("type") == "object" or "properties" in schema:
        members, wanted = schema.get("properties", {}), schema.get("required", [])
        if schema.get("additionalProperties") is not False or set(members) != set(wanted):
            return False
    return all(is_closed(value) for key, value in schema.items() if key not in ("enum", "const", "required"))


@dataclass
class Collected:
    """An answer as it would be sent."""

    status: int = 0
    headers: Headers = field(default_factory=list)
    parts: list[bytes] = field(default_factory=list)
    size: int = 0

    async def take(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], message["headers"]
            return
        self.parts.append(message.get("body", b""))
        self.size += len(self.parts[-1])
        if self.size > LONGEST:
            raise Unanswered(Refusal(502, "the engine's answer has no end", "engine_broke"))

    async def unfit(self, held: Held) -> Unfit | None:
        """Of an engine's refusal nothing is checked."""
        return await held.unfit(texts_of(b"".join(self.parts))) if self.status == 200 else None

    async def send_on(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status, "headers": self.headers})
        await send({"type": "http.response.body", "body": b"".join(self.parts)})


class Checking:
    """A `send` between an engine's stream and the caller: passes it on, and at its end says whether it fitted."""

    def __init__(self, held: Held, send: Send) -> None:
        self._held, self._send = held, send
        self._start: Message | None = None
        self._is_through = False
        self._unread = b""
        self._said: dict[int, list[str]] = defaultdict(list)

    async def __call__(self, message: Message) -> None:
        """Raises Refusal for an engine that answers whole instead, and not as it should."""
        if message["type"] == "http.response.start":
            self._start, self._is_through = message, message["status"] != 200
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        if self._start:
            if not more and not self._is_through and (unfit := await self._held.unfit(texts_of(body))):
                raise _does_not_fit(self._held, unfit)
            start, self._start = self._start, None
            await self._send(start)
        if not more or self._is_through:
            await self._send(message)
            return
        *events, self._unread = EVENT_END.split(self._unread + body)
        if len(self._unread) > LONGEST_EVENT:
            raise ValueError("an event without end")
        for event in events:
            await self._event(event)

    async def _event(self, event: bytes) -> None:
        out = event + b"\n\n"
        if _data(event).strip() == END:
            self._is_through = True
            if unfit := await self._held.unfit(["".join(each) for _, each in sorted(self._said.items())]):
                out = event_of(_does_not_fit(self._held, unfit))
        else:
            for place, text in _pieces(_data(event)):
                self._said[place].append(text)
        await self._send({"type": "http.response.body", "body": out, "more_body": True})


def texts_of(body: bytes) -> list[str]:
    """Pure. What was said in an answer, by choice; of a stream its events put together."""
    said: dict[int, list[str]] = defaultdict(list)
    is_stream = body.lstrip().startswith((b"data:", b":", b"event:"))
    for part in map(_data, EVENT_END.split(body)) if is_stream else [body]:
        for place, text in _pieces(part):
            said[place].append(text)
    return ["".join(each) for _, each in sorted(said.items())]


def _data(event: bytes) -> bytes:
    return b"\n".join(each[5:] for each in event.splitlines() if each.startswith(b"data:"))


def _pieces(part: bytes) -> Iterator[tuple[int, str]]:
    """The text of each choice: of a chat's message, of its delta, or of a completion."""
    try:
        found = json.loads(part)
    except (ValueError, RecursionError):
        return
    choices = found.get("choices") if isinstance(found, dict) else None
    for choice in choices if isinstance(choices, list) else []:
        if isinstance(choice, dict):
            inner = choice.get("message") or choice.get("delta")
            text = inner.get("content") if isinstance(inner, dict) else choice.get("text")
            place = choice.get("index")
            yield place if isinstance(place, int) else 0, text if isinstance(text, str) else ""


async def _collected(board: Board, attempt: Attempt) -> Collected:
    """Raises also where it broke in the middle: nothing has gone out."""
    answer = Collected()
    broke = await pass_on(board, attempt, answer.take)
    if broke is not None and broke.code == "answer_timeout":
        raise broke
    if broke is not None:
        raise Unanswered(Refusal(503, broke.message, "engine_away", retry_after=5), again=True)
    return answer


def _does_not_fit(held: Held, unfit: Unfit) -> Refusal:
    return Refusal(502, f"the answer does not fit the schema of {held.route}: {unfit.why}", "answer_does_not_fit")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")

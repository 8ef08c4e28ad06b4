"""Scores a model behind somebody's OpenAI-compatible API on the test rows. Each answer is paid for, so each is kept.

The provider is asked what the bare base is asked (the task spelt out: it has seen no example either), with the same
length and temperature. What it said is kept by its content, so neither a crash nor a repeat asks, or pays, again.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import aiohttp

from jobs.evaluation.ask_rows import Answer, Messages, Patience, Progress, ask_rows
from jobs.evaluation.evaluate import EvalRequest, picked_rows
from jobs.evaluation.metrics import mark
from jobs.evaluation.prompts import spell_out
from jobs.post_message import proxy_for
from jobs.sink_answer import retry_after
from jobs.token_histogram import estimate
from registry.charges import Charge, Payer, reserved
from registry.chat_data import Row
from registry.cloud_terms import ReferenceModel
from registry.errors import EngineError, RecipeError, Trouble
from registry.recipe import expand
from registry.recipe_part import VARIABLE
from registry.scores import Scored, answers_of, keep_score, score_key
from registry.store import Store

# Providers count requests a minute; more at once only brings more refusals.
AT_ONCE = 8
AGAIN = {408, 409, 425, 429}
REPLY_SHOWN = 300
# As ask_rows asks: part of the key of a kept answer.
OPTIONS = {"temperature": 0}
KEPT = "look at the provider's status page; what it has answered is kept, and not asked again"
# Of one question: with all its attempts and what the provider asks to wait for.
ANSWER_SECONDS = 3600.0


@dataclass(frozen=True)
class Terms:
    """`attempts` at each question, each of `seconds` at most; before the second `pause` seconds, doubled each time.

    A provider that wants to be left alone for longer than `longest` seconds is given up.
    """

    attempts: int = 8
    seconds: float = 180.0
    pause: float = 1.0
    longest: float = 300.0


@dataclass(frozen=True)
class Said:
    text: str


async def score_reference(
    payer: Payer, reference: ReferenceModel, request: EvalRequest, progress: Progress, terms: Terms | None = None
) -> Scored:
    """What the model got on the request's rows; rows that it gave no answer to count as wrong.

    Raises RecipeError for an address, a key or a model that is wrong, EngineError if too many rows got no answer, and
    where it has prices BudgetError, before any question, if the payer cannot pay for all of them.
    """
    rows, task = picked_rows(request), request.task
    questions = [spell_out(row.prompt, task, request.labels) for row in rows]
    at_once = min(task.concurrency, AT_ONCE)
    async with Provider(payer.store, reference, terms or Terms(), at_once) as provider:
        usd = await asyncio.to_thread(provider.most_usd, questions, task.max_new_tokens)
        with reserved(payer, f"asking {reference.model}", usd) if usd else nullcontext() as provider.charge:
            answers = await _answers(provider, questions, task.max_new_tokens, at_once, progress)
    marks = mark(task.task, task.json_schema, [row.answer for row in rows], [each.text for each in answers])
    failed = [at for at, answer in enumerate(answers) if answer.text is None]
    return Scored(reference.model, None, metrics=marks.metrics, values=marks.values, failed=failed)


async def _answers(
    provider: Provider, questions: list[Messages], max_tokens: int, at_once: int, progress: Progress
) -> list[Answer]:
    patience = Patience(seconds=ANSWER_SECONDS, attempts=1)
    try:
        return await ask_rows(provider, provider.model, questions, max_tokens=max_tokens, concurrency=at_once,
                              patience=patience, progress=progress)  # fmt: skip
    except EngineError as error:
        raise EngineError(error.what, place=provider.url, fix=KEPT) from error


class Provider:
    """The part of an engine that asking needs, at a provider's. Made inside a running event loop. Answers are paid for
    out of `charge`, if there is one."""

    def __init__(self, store: Store, reference: ReferenceModel, terms: Terms, at_once: int) -> None:
        self.url = f"{_expanded(reference.url, 'escalate.reference.url').rstrip('/')}/chat/completions"
        self._store, self._reference, self._terms = store, reference, terms
        self.model = reference.model
        self.charge: Charge | None = None
        self._key = ""
        self._refused: set[str] = set()
        self._not_before = 0.0
        self._at_once = at_once
        self._slots = asyncio.Semaphore(at_once)

    async def __aenter__(self) -> Provider:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=self._terms.seconds))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    def most_usd(self, questions: list[Messages], max_tokens: int) -> float:
        """What those that have no kept answer may cost: all of `max_tokens` each. 0 where the model has no prices."""
        if not self._reference.has_prices:
            return 0.0
        asked = [{"model": self.model, "messages": each, "max_tokens": max_tokens, **OPTIONS} for each in questions]
        new = [each for each in asked if not answers_of(self._store, self._key_of(each))]
        return sum(self._most_usd(each) for each in new)

    async def chat(self, name: str, messages: Messages, **options: Any) -> Said:
        """A kept answer, or one that is asked for and kept."""
        asked = {"model": name, "messages": messages, **options}
        key = self._key_of(asked)
        kept = await asyncio.to_thread(answers_of, self._store, key)
        if kept:
            return Said(str(kept[0]["text"]))
        text = await self._ask(asked)
        one = Scored(f"reference {name}", None, missing="one answer of a provider")
        await asyncio.to_thread(keep_score, self._store, key, one, [{"text": text}])
        return Said(text)

    def _key_of(self, asked: dict[str, Any]) -> str:
        return score_key({"provider": self.url, **asked})

    def _most_usd(self, asked: dict[str, Any]) -> float:
        return self._reference.usd(estimate(Row(asked["messages"])), int(asked["max_tokens"]))

    async def _pay(self, text: str, asked: dict[str, Any]) -> None:
        """What the answer says that it used; the most that it can have used, where it says nothing."""
        if self.charge is not None:
            used = _usage_in(text)
            usd = self._reference.usd(*used) if used else self._most_usd(asked)
            await asyncio.to_thread(self.charge.spend, usd)

    def _pay_for_unread(self, asked: dict[str, Any]) -> None:
        # Another question's trouble ends all that are under way: eight answers were paid for, and six in the books.
        if self.charge is not None:
            self.charge.spend(self._most_usd(asked))

    async def _ask(self, asked: dict[str, Any]) -> str:
        attempt = 1
        while True:
            body, (status, text, wait) = await self._in_turn(asked)
            if status == 200:
                await self._pay(text, asked)  # first: an answer that cannot be used costs as much
                return _answer_in(text, self.url)
            refused = _refused_option(status, text)
            if refused in body:
                self._refused.add(refused)
                continue
            self._raise_what_stays(status, text, str(asked["model"]))
            if not _passes(status) or attempt == self._terms.attempts:
                raise self._gave_up(status, text)
            self._put_off(wait, attempt)
            attempt += 1

    async def _in_turn(self, asked: dict[str, Any]) -> tuple[dict[str, Any], tuple[int | None, str, str]]:
        """What was sent and what came back. Who is told to slow down has one question less under way from then on."""
        await self._slots.acquire()
        status: int | None = None
        try:
            await self._wait()
            body = self._body(asked)
            try:
                answer = await self._post(body)
            except asyncio.CancelledError:
                self._pay_for_unread(asked)
                raise
            status = answer[0]
            return body, answer
        finally:
            if status == 429 and self._at_once > 1:
                self._at_once -= 1
            else:
                self._slots.release()

    def _body(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Models that reason take neither a temperature nor `max_tokens` under that name."""
        body = {name: value for name, value in asked.items() if name not in self._refused}
        if "max_tokens" in self._refused:
            body["max_completion_tokens"] = asked["max_tokens"]
        return body

    async def _post(self, body: dict[str, Any]) -> tuple[int | None, str, str]:
        """Status (None where none came), what was said, and Retry-After."""
        try:
            async with self._session.post(
                self.url, json=body, headers=self._headers(), allow_redirects=False, proxy=proxy_for(self.url)
            ) as reply:
                text = await reply.text(errors="replace")
                shown = text if reply.status == 200 else self._scrubbed(text)
                return reply.status, shown, reply.headers.get("Retry-After", "")
        except TimeoutError:
            return None, f"nothing within {self._terms.seconds:g} s", ""
        except aiohttp.InvalidURL as error:
            raise RecipeError(f"no address: {self.url}", place="escalate.reference.url",
                              fix="write one like https://api.openai.com/v1") from error  # fmt: skip
        except (aiohttp.ClientError, OSError) as error:
            return None, self._scrubbed(f"{type(error).__name__}: {error}"), ""

    def _headers(self) -> dict[str, str]:
        """Read only when something must be asked: kept answers need no key."""
        if self._reference.key is not None and not self._key:
            self._key = _expanded(self._reference.key, "escalate.reference.key").strip()
        return {"Authorization": f"Bearer {self._key}"} if self._key else {}

    def _scrubbed(self, text: str) -> str:
        """Providers repeat a wrong key in what they say of it."""
        shown = text.replace(self._key, "***") if self._key else text
        return " ".join(shown.split())[:REPLY_SHOWN]

    def _raise_what_stays(self, status: int | None, text: str, model: str) -> None:
        """What no other row and no other attempt would change ends the asking."""
        if status in (401, 403):
            raise RecipeError(f"{self.url} does not take the key ({status}): {text}", place="escalate.reference.key",
                              fix="set another in .env")  # fmt: skip
        if status == 404:
            raise RecipeError(f"{self.url} knows no model '{model}' (404): {text}", place="escalate.reference",
                              fix="correct `model`, and `url`, which ends with /v1")  # fmt: skip
        if status == 402 or (status == 429 and "insufficient_quota" in text):
            raise Trouble(f"the account has no money left ({status}): {text}", place=self.url,
                          fix=KEPT)  # fmt: skip

    def _gave_up(self, status: int | None, text: str) -> EngineError | Trouble:
        """A row that fails alone is an EngineError; a provider that is away, or has no room, is nobody to ask on."""
        if status is None or status == 429:
            return Trouble(f"the provider does not answer ({status or text})", place=self.url, fix=KEPT)
        return EngineError(f"the provider answered {status}: {text}")

    def _put_off(self, wait: str, attempt: int) -> None:
        """All questions wait: who has been told to slow down and goes on with others is told so again."""
        now = time.time()
        asked = retry_after(wait, now) if wait else None
        seconds = asked - now if asked is not None else self._terms.pause * 2 ** (attempt - 1)
        if asked is not None and seconds > self._terms.longest:
            raise Trouble(f"the provider wants to be left alone for {seconds:.0f} s", place=self.url,
                          fix=KEPT)  # fmt: skip
        self._not_before = max(self._not_before, time.monotonic() + min(seconds, self._terms.longest))

    async def _wait(self) -> None:
        while (left := self._not_before - time.monotonic()) > 0:
            await asyncio.sleep(left)


def _expanded(text: str, place: str) -> str:
    found = expand(text, place)
    if not found:
        names = ", ".join(VARIABLE.findall(text)) or "nothing"
        raise RecipeError(f"not set: {names}", place=place, fix="set it in the environment or in .env")
    return found


def _answer_in(text: str, url: str) -> str:
    """Raises LookupError, TypeError or ValueError for an answer that is not what OpenAI's API says."""
    choice = json.loads(text)["choices"][0]
    said = choice["message"].get("content") or ""
    if not isinstance(said, str):
        raise TypeError("content is no text")
    if not said and choice.get("finish_reason") == "length":
        # A model that reasons first had not begun to answer: a score of 0 would be one of our limit, not of the model.
        raise EngineError("all tokens were spent before the answer; evaluate.max_new_tokens is too small", place=url)
    return said


def _usage_in(text: str) -> tuple[int, int] | None:
    """Tokens of question and answer; None where the answer does not tell."""
    try:
        usage = json.loads(text)["usage"]
        return int(usage["prompt_tokens"]), int(usage["completion_tokens"])
    except (LookupError, TypeError, ValueError):
        return None


def _passes(status: int | None) -> bool:
    return status is None or status in AGAIN or status >= 500


def _refused_option(status: int | None, text: str) -> str:
    """`max_tokens` or `temperature`, where a 400 says that the model does not take it; '' otherwise."""
    if status != 400:
        return ""
    if "max_completion_tokens" in text:
        return "max_tokens"
    return "temperature" if re.search("""['"`]temperature['"`]""", text) else ""

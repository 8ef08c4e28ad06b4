"""Asks an engine many questions, some at once, patiently but not for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from registry.errors import EngineError, FtError

Messages = list[dict[str, str]]
Progress = Callable[[int, int], None]


class Reply(Protocol):
    @property
    def text(self) -> str: ...


class Asked(Protocol):
    """The part of an engine that asking needs."""

    async def chat(self, name: str, messages: Messages, **options: Any) -> Reply: ...


@dataclass(frozen=True)
class Answer:
    """One row's answer; `text` is None and `error` says why when every attempt failed."""

    text: str | None
    error: str = ""
    attempts: int = 1

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Patience:
    """`seconds` for one answer, `attempts` at each, `pause` seconds before the second (doubled each time).

    When more than `tolerated` of all rows have failed, it is the engine that failed, and asking stops.
    """

    seconds: float = 900.0
    attempts: int = 3
    pause: float = 0.5
    tolerated: float = 0.1


async def ask_rows(
    engine: Asked,
    name: str,
    questions: Sequence[Messages],
    *,
    max_tokens: int,
    concurrency: int,
    patience: Patience,
    progress: Progress,
) -> list[Answer]:
    """The answers of the model `name`, in the questions' order, at temperature 0.

    `progress(done, total)` is called after each. Raises EngineError when more rows fail than `patience`
    tolerates: scores of an engine that is down would be a verdict on the engine.
    """
    answers: list[Answer | None] = [None] * len(questions)
    waiting = iter(range(len(questions)))
    failed: list[Answer] = []
    done = 0

    async def work(waiting: Iterator[int]) -> None:
        nonlocal done
        for at in waiting:
            if _too_many(failed, len(questions), patience):
                return
            answer = await _ask(engine, name, questions[at], max_tokens, patience)
            answers[at] = answer
            if answer.text is None:
                failed.append(answer)
            done += 1
            progress(done, len(questions))

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(questions))):
                group.create_task(work(waiting))
    except* FtError as several:  # of `progress`: callers know single errors
        raise several.exceptions[0] from None
    if _too_many(failed, len(questions), patience):
        raise EngineError(
            f"{name} gave no answer to {len(failed)} questions, so no score; the first: {failed[0].error}",
            fix="look at the engine's log (`ft serve status` names it); a prompt that is too long needs "
            "more serve.max_context",
        )
    return [each for each in answers if each is not None]


async def _ask(engine: Asked, name: str, messages: Messages, max_tokens: int, patience: Patience) -> Answer:
    error = ""
    for attempt in range(1, patience.attempts + 1):
        try:
            async with asyncio.timeout(patience.seconds):
                reply = await engine.chat(name, messages, max_tokens=max_tokens, temperature=0)
            return Answer(reply.text, attempts=attempt)
        except EngineError as failure:
            error = failure.what
        except TimeoutError:
            error = f"no answer within {patience.seconds:.0f} s"
        except (LookupError, TypeError, ValueError) as failure:
            # An answer of 200 that is not what OpenAI's API says.
            error = f"an answer that cannot be read ({type(failure).__name__}: {failure})"
        if attempt < patience.attempts:
            await asyncio.sleep(patience.pause * 2 ** (attempt - 1))
    return Answer(None, error, patience.attempts)


def _too_many(failed: list[Answer], rows: int, patience: Patience) -> bool:
    return len(failed) > patience.tolerated * rows

"""What follows from a receiver's answer: done, again later, or given up. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from email.utils import parsedate_to_datetime

FIRST_SECONDS, LONGEST_SECONDS = 1.0, 3600.0
GIVE_UP_SECONDS = 24 * 3600.0
# A receiver that does not answer at all is tried again with the next message after this at the latest.
AWAY_SECONDS = 60.0
AGAIN = {408, 425, 429}


@dataclass(frozen=True)
class Answer:
    """`status` is None where none came; `text` is what was said, without secrets; `wait` is Retry-After as sent."""

    status: int | None
    text: str
    wait: str
    seconds: float

    @property
    def fine(self) -> bool:
        return self.status is not None and 200 <= self.status < 300

    @property
    def words(self) -> str:
        return f"{self.status} {self.text}".strip() if self.status is not None else self.text


@dataclass(frozen=True)
class Outcome:
    """`due` is when to try the message again, None: never. `pause`: send the sink nothing until then. Unix seconds."""

    done: bool = False
    reason: str = ""
    due: float | None = None
    pause: float | None = None
    away: bool = False
    disable: bool = False


def judge_answer(answer: Answer, attempt: int, first: float, now: float, *, away: int, luck: float) -> Outcome:
    """`attempt` counts from 1, `first` is when the first was made, `luck` is a random number of 0 to 1.

    `away` is how often in a row the sink had not answered at all before.
    """
    if answer.fine:
        return Outcome(done=True)
    if answer.status == 410:
        return Outcome(reason=f"{answer.words} (gone: the sink is sent nothing more)", disable=True)
    if answer.status is not None and 300 <= answer.status < 400:
        return Outcome(reason=f"{answer.status}: redirects are not followed; put the new address into ft.yaml")
    if answer.status is not None and 400 <= answer.status < 500 and answer.status not in AGAIN:
        return Outcome(reason=answer.words)
    asked = _asked(answer, now)
    due = asked if asked is not None else now + backoff(attempt, luck)
    if due > first + GIVE_UP_SECONDS:
        return Outcome(reason=f"{answer.words} (not taken within {GIVE_UP_SECONDS / 3600:.0f} hours)")
    pause = asked
    if answer.status is None:
        pause = now + min(backoff(away + 1, luck), AWAY_SECONDS)
    return Outcome(reason=answer.words, due=due, pause=pause, away=answer.status is None)


def backoff(attempt: int, luck: float) -> float:
    """1, 2, 4 ... 3600 s, less up to half of it, so that many do not come back at the same moment."""
    return float(min(FIRST_SECONDS * 2.0 ** min(attempt - 1, 30), LONGEST_SECONDS) * (1 - luck / 2))


def _asked(answer: Answer, now: float) -> float | None:
    """When the receiver wants to be asked again: Retry-After is seconds or a date."""
    return retry_after(answer.wait, now) if answer.status in (429, 503) and answer.wait else None


def retry_after(header: str, now: float) -> float | None:
    """Unix time, a second from now at the least; None for what is neither seconds nor a date."""
    if header.strip().isdecimal():
        return now + max(1.0, float(header.strip()[:9]))
    try:
        return max(now + 1.0, parsedate_to_datetime(header).timestamp())
    except (ValueError, OverflowError):
        return None

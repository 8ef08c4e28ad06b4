"""Rules: which route a request for `auto` (or another name of `when.model`) leads to. Pure; the first that fits
decides.

Words are compared in one form (NFKC, case folded, spaces made one). A Latin word has to stand by itself; a Korean one
may stand anywhere, since particles follow it without a space: 환불 is in "환불은요?".
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from registry.serve_recipe import Rule, When

# Characters per token of multilingual models' tokenizers: of Latin script some 4, of Hangul, kana and Han some 1.5.
LATIN, ASIAN = 4.0, 1.5
# Beside a keyword's own letter of these scripts none may stand: they put spaces between words.
SPACED = r"[a-z0-9_\u00df-\u024f\u0370-\u052f]"
LONGEST_LOOKED_AT = 100_000


@dataclass(frozen=True)
class Question:
    """What rules look at. `headers` with lower-case names."""

    name: str
    request: Mapping[str, Any]
    headers: Mapping[str, str]
    key: str = ""

    @cached_property
    def last(self) -> str:
        """The last user message, in the form in which words are compared."""
        return plain(last_message(self.request)[:LONGEST_LOOKED_AT])

    @cached_property
    def tokens(self) -> int:
        """Of the whole prompt, as far as characters tell."""
        return estimate_tokens(texts_of(self.request)) + _token_ids(
            self.request.get("prompt", self.request.get("input"))
        )

    @property
    def user(self) -> str:
        return str(self.request.get("user") or "")


@dataclass(frozen=True)
class Chosen:
    """`rule` counts from 1; 0 where none fitted, or none was asked."""

    route: str
    rule: int
    why: str


class Rules:
    """Compiled once for a policy."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._rules = [_Compiled(rule.when, rule.route) for rule in rules]
        self.names = frozenset(name for rule in rules for name in rule.when.model)
        self.read_headers = any(rule.when.header for rule in rules)

    def concern(self, name: str) -> bool:
        return name in self.names

    def choose(self, question: Question) -> Chosen | None:
        """None if no rule fits."""
        for number, rule in enumerate(self._rules, start=1):
            reasons = rule.fits(question)
            if reasons is not None:
                return Chosen(rule.route, number, ", ".join(reasons) or "it fits everything")
        return None

    def misses(self, question: Question) -> list[tuple[int, str, str]]:
        """(number, route, the part of `when` that is not so) of each rule before the one that fits."""
        found = []
        for number, rule in enumerate(self._rules, start=1):
            if not (miss := rule.miss(question)):
                break
            found.append((number, rule.route, miss))
        return found


class _Compiled:
    def __init__(self, when: When, route: str) -> None:
        self.when, self.route = when, route
        self._words = [(word, _pattern(word)) for word in when.keywords]
        self._headers = {name.lower(): value for name, value in when.header.items()}

    def fits(self, question: Question) -> list[str] | None:
        """Why, or None."""
        if self.miss(question):
            return None
        word = self._word(question) if self._words else None
        return ([f"the last message has '{word}'"] if word else []) + self._told(question)

    def miss(self, question: Question) -> str:
        """The first part of `when` that is not so; '' if all are. What costs the most is looked at last."""
        when = self.when
        if question.name not in when.model:
            return "model"
        if when.key and question.key not in when.key:
            return "key"
        if when.user and question.user not in when.user:
            return "user"
        if any(question.headers.get(name) != value for name, value in self._headers.items()):
            return "header"
        if when.min_tokens is not None and question.tokens < when.min_tokens:
            return "min_tokens"
        if when.max_tokens is not None and question.tokens > when.max_tokens:
            return "max_tokens"
        return "keywords" if self._words and self._word(question) is None else ""

    def _word(self, question: Question) -> str | None:
        return next((word for word, pattern in self._words if pattern.search(question.last)), None)

    def _told(self, question: Question) -> list[str]:
        when = self.when
        said = [f"key is {question.key}"] if when.key else []
        said += [f"user is {question.user}"] if when.user else []
        said += [f"{name} is {value}" for name, value in self._headers.items()]
        if when.min_tokens is not None or when.max_tokens is not None:
            said.append(f"the prompt has about {question.tokens} tokens")
        return said


def plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def last_message(request: Mapping[str, Any]) -> str:
    """Text of the last user message, or the prompt."""
    messages = request.get("messages")
    if isinstance(messages, list):
        of_users = [each for each in messages if isinstance(each, dict) and each.get("role") == "user"]
        return " ".join(_texts(of_users[-1].get("content"))) if of_users else ""
    return " ".join(texts_of(request))


def first_message(request: Mapping[str, Any]) -> str:
    """Text of the first user message; '' of a completion, which is no conversation."""
    messages = request.get("messages")
    if not isinstance(messages, list):
        return ""
    first = next((each for each in messages if isinstance(each, dict) and each.get("role") == "user"), {})
    return " ".join(_texts(first.get("content")))


def texts_of(request: Mapping[str, Any]) -> list[str]:
    """All text of a prompt: of messages, a prompt, or the input of embeddings."""
    messages = request.get("messages")
    if isinstance(messages, list):
        return [text for each in messages if isinstance(each, dict) for text in _texts(each.get("content"))]
    return list(_texts(request.get("prompt", request.get("input"))))


def estimate_tokens(texts: Iterable[str]) -> int:
    """About so many; to route by, not to bill by. Asian scripts take three bytes a character: to measure the bytes is
    a hundred times faster than to look at each."""
    whole = "".join(texts)
    asian = 0 if whole.isascii() else (len(whole.encode(errors="replace")) - len(whole)) / 2
    return round(asian / ASIAN + (len(whole) - asian) / LATIN)


def _texts(content: Any) -> Iterable[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, list):
        for part in content:
            if isinstance(part, str):
                yield part
            elif isinstance(part, dict) and isinstance(part.get("text"), str):
                yield part["text"]


def _token_ids(prompt: Any) -> int:
    """Of prompts that come as numbers."""
    if not isinstance(prompt, list):
        return 0
    return sum(len(each) if isinstance(each, list) else isinstance(each, int) for each in prompt)


def _pattern(word: str) -> re.Pattern[str]:
    text = plain(word)
    before = f"(?<!{SPACED})" if re.match(SPACED, text[:1]) else ""
    after = f"(?!{SPACED})" if re.match(SPACED, text[-1:]) else ""
    return re.compile(before + re.escape(text) + after)

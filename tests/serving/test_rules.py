"""Which route a request leads to: words in two scripts, lengths, headers, users, keys; the first that fits."""

from __future__ import annotations

from typing import Any

import pytest

from registry.serve_recipe import Rule, When
from serving.rules import Question, Rules, estimate_tokens, plain


def chat(text: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "system", "content": "refund"}, {"role": "user", "content": text}], **more}


def led(when: When, request: dict[str, Any], name: str = "auto", key: str = "", **headers: str) -> bool:
    given = {each.replace("_", "-"): value for each, value in headers.items()}
    return Rules([Rule(when=when, route="there")]).choose(Question(name, request, given, key)) is not None


@pytest.mark.parametrize(
    ("word", "text", "fits"),
    [
        ("환불", "환불은 어떻게 받나요?", True),
        ("환불", "전액환불을 원해요", True),
        ("환불", "환 불", False),
        ("교환 환불", "교환   환불 문의", True),
        ("환불", "환불".encode().decode(), True),
        ("환불", "\u1112\u116a\u11ab\u1107\u116e\u11af", True),  # the same syllables, as letters (macOS)
        ("refund", "I want a REFUND!", True),
        ("refund", "ＲＥＦＵＮＤ please", True),
        ("refund", "refunds", False),
        ("refund", "prerefund", False),
        ("refund", "refund을 원해요", True),
        ("refund", "환불refund환불", True),
        ("c++", "is C++ hard?", True),
        ("7일", "17일", False),
        ("7일", "7일안에", True),
        ("straße", "STRASSE", True),
        ("a.b", "axb", False),
        ("gpu", "gpu_memory", False),
        ("café", "cafe\u0301 au lait", True),
        ("caf", "café", False),
    ],
)
def test_words(word: str, text: str, fits: bool) -> None:
    assert led(When(keywords=[word]), chat(text)) is fits


@pytest.mark.parametrize(
    "request_",
    [
        {"messages": [{"role": "user", "content": "refund"}, {"role": "user", "content": "hello"}]},
        {"messages": [{"role": "assistant", "content": "refund"}]},
        {"messages": "refund"},
        {"messages": [{"role": "user", "content": {"text": "refund"}}]},
        {"messages": [None, 3, {"role": "user"}]},
        {"prompt": 3},
        {},
    ],
)
def test_only_the_last_user_message_is_looked_at(request_: dict[str, Any]) -> None:
    assert not led(When(keywords=["refund"]), request_)


@pytest.mark.parametrize(
    "request_",
    [
        chat([{"type": "text", "text": "my"}, {"image_url": {}}, {"type": "text", "text": "refund"}]),
        {"prompt": "refund"},
        {"prompt": ["hello", "refund"]},
        {"input": "refund"},
    ],
)  # fmt: skip
def test_where_text_may_be(request_: dict[str, Any]) -> None:
    assert led(When(keywords=["refund"]), request_)


def test_all_that_is_given_must_be_so() -> None:
    when = When(model=["auto", "help"], keywords="refund", user="u-1", key="shop", header={"X-Tier": "gold"})
    request = chat("refund", user="u-1")
    assert led(when, request, key="shop", x_tier="gold")
    assert led(when, request, name="help", key="shop", x_tier="gold")
    assert not led(when, request, name="tickets", key="shop", x_tier="gold")
    assert not led(when, request, key="", x_tier="gold")
    assert not led(when, request, key="shop", x_tier="silver")
    assert not led(when, chat("refund", user="u-2"), key="shop", x_tier="gold")
    assert not led(when, chat("hello", user="u-1"), key="shop", x_tier="gold")


def test_lengths_are_of_the_whole_prompt() -> None:
    long = {"messages": [{"role": "system", "content": "word " * 800}, {"role": "user", "content": "short"}]}
    assert led(When(min_tokens=500), long)
    assert not led(When(max_tokens=500), long)
    assert led(When(max_tokens=500), chat("short"))
    assert led(When(min_tokens=500), {"prompt": list(range(600))})  # token ids are counted exactly
    assert led(When(min_tokens=500), {"prompt": [[1] * 300, [2] * 300]})


def test_an_estimate_by_script() -> None:
    assert estimate_tokens(["a" * 400]) == 100
    assert 60 <= estimate_tokens(["가" * 100]) <= 100


def test_the_first_that_fits_decides_and_says_why() -> None:
    rules = Rules([
        Rule(when=When(keywords="refund"), route="a"), Rule(when=When(key="shop"), route="b"), Rule(route="c")
    ])  # fmt: skip
    first = rules.choose(Question("auto", chat("refund"), {}, "shop"))
    assert first is not None
    assert (first.route, first.rule, "refund" in first.why) == ("a", 1, True)
    second, last = (rules.choose(Question("auto", chat("hello"), {}, key)) for key in ("shop", ""))
    assert second is not None
    assert last is not None
    assert [(each.route, each.rule) for each in (second, last)] == [("b", 2), ("c", 3)]
    assert rules.misses(Question("auto", chat("hello"), {})) == [(1, "a", "keywords"), (2, "b", "key")]
    assert rules.choose(Question("tickets", chat("refund"), {}, "shop")) is None


def test_one_form_of_a_text() -> None:
    assert plain("  Ａ\u3000ﬁ\n\tX ") == "a fi x"


def test_a_text_without_end_takes_no_time_to_speak_of() -> None:
    import time

    began = time.perf_counter()
    assert not led(When(keywords=["refund", "환불"]), chat("가a" * 4_000_000))
    assert time.perf_counter() - began < 1.0

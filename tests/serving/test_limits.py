"""What a caller may ask for, and what never reaches an engine."""

from __future__ import annotations

from typing import Any

import pytest

from registry.serve_recipe import Limits
from serving.http_messages import Refusal
from serving.limits import FORBIDDEN, hold_to

SOME = Limits(max_tokens=100, n=4)


def refused(request: dict[str, Any], limits: Limits = SOME, *, generates: bool = True) -> str:
    """The parameter that is named, '' if it passes."""
    try:
        hold_to(limits, request, generates=generates)
    except Refusal as refusal:
        return refusal.param or "?" if refusal.status == 400 else "?"
    return ""


def part(**given: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "what is this?"}, given]}]}


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "n", "best_of"])
@pytest.mark.parametrize("value", [-1, 10_000, 1.0, "1", True, [1], float("inf"), 10**30])
def test_numbers_within_bounds(name: str, value: Any) -> None:
    assert refused({name: value}) == name
    assert refused({name: 1}) == ""
    assert refused({name: None}) == ""


def test_the_most_tokens_are_set_where_none_are() -> None:
    for given, holds in (({}, 100), ({"max_tokens": None}, 100), ({"max_tokens": 7}, 7)):
        request: dict[str, Any] = {**given}
        hold_to(SOME, request, generates=True)
        assert request["max_tokens"] == holds
    newer = {"max_completion_tokens": 7}
    hold_to(SOME, newer, generates=True)
    assert newer == {"max_completion_tokens": 7}
    for limits, generates in ((SOME, False), (Limits(), True)):
        untouched: dict[str, Any] = {}
        hold_to(limits, untouched, generates=generates)
        assert untouched == {}


@pytest.mark.parametrize("name", sorted(FORBIDDEN))
def test_what_would_reach_into_the_engine(name: str) -> None:
    assert refused({name: {}}) == name
    assert refused({name: None}) == name


def test_a_template_has_values_but_is_not_the_callers() -> None:
    assert refused({"chat_template_kwargs": {"enable_thinking": False}}) == ""
    assert refused({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}) == "chat_template_kwargs"


def test_what_is_not_known_passes() -> None:
    assert refused({"min_p": 0.1, "structured_outputs": {"regex": "a"}, "made_up": [1], "stream": True}) == ""


def test_as_many_prompts_as_answers() -> None:
    assert refused({"prompt": ["a"] * 4}) == ""
    assert refused({"prompt": ["a"] * 5}) == "prompt"
    assert refused({"prompt": list(range(500))}) == ""
    assert refused({"prompt": [[1, 2]] * 5}) == "prompt"


MEDIA = [
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
    {"type": "image_url", "image_url": "data:image/png;base64,AAAA"},
    {"image_url": {"url": "data:image/png;base64,AAAA"}},
    {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
    {"type": "file", "file": {"file_data": "data:application/pdf;base64,AAAA"}},
    {"type": "text", "image_url": "data:image/png;base64,AAAA"},
    {"type": "made_up", "x": "AAAA"},
    {"type": ["image_url"]},
]


@pytest.mark.parametrize("given", MEDIA)
def test_media_only_where_the_route_takes_them(given: dict[str, Any]) -> None:
    assert refused(part(**given)) == "messages"
    assert refused(part(**given), Limits(media=True)) == ""


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest", "https://a.example/x.png", "HTTP://A", "file:///etc/passwd", " http://a",
        "\thttp://a", "ht\ntp://a", "ht" + "\n" * 100 + "tp://a", "//a.example/x", "ftp://a", "", "x", "s3://b/k",
    ],
)  # fmt: skip
def test_addresses_are_never_fetched(url: str) -> None:
    media = Limits(media=True)
    assert refused(part(type="image_url", image_url={"url": url}), media) == "messages"
    assert refused(part(image_url=url), media) == "messages"
    assert refused(part(type="video_url", video_url={"a": [{"url": url}]}), media) == "messages"
    assert refused({"messages": [{"content": {"type": "image_url", "image_url": {"url": url}}}]}, media) == "messages"


@pytest.mark.parametrize("name", ["image_embeds", "audio_embeds", "prompt_embeds"])
def test_tensors_are_never_taken(name: str) -> None:
    assert refused(part(type=name, **{name: "AAAA"}), Limits(media=True)) == "messages"
    assert refused(part(**{name: "AAAA"}), Limits(media=True)) == "messages"


@pytest.mark.parametrize("messages", [None, "x", 3, [None], [[]], [{"content": 3}], [{"content": [None, "x", 3, []]}]])
def test_odd_messages_are_the_engines_to_refuse(messages: Any) -> None:
    assert refused({"messages": messages}) == ""

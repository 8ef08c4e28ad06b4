"""What a caller may ask for: checked before anything goes to an engine. Pure but for the field that it fills in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from registry.serve_recipe import Limits
from serving.http_messages import Refusal

# Fields of vLLM's own that reach into the engine: where caches come from, who goes first, how requests are named, what
# is loaded; and tensors, which it unpickles.
FORBIDDEN = frozenset({
    "kv_transfer_params", "ec_transfer_params", "priority", "request_id", "lora_request", "vllm_xargs",
    "logits_processors", "mm_processor_kwargs", "media_io_kwargs", "prompt_embeds", "chat_template",
})  # fmt: skip
# A template of the caller's own is a program that runs in the engine.
FORBIDDEN_FOR_TEMPLATE = frozenset({"chat_template", "tokenize"})
MOST_TOKENS = 1_000_000
TOKEN_FIELDS = ("max_tokens", "max_completion_tokens")
# vLLM looks at what a part has as well as at what it says it is.
TEXT = frozenset({"text", "refusal", "input_text", "output_text", "thinking", "reasoning"})
MEDIA = frozenset({"image_url", "image_pil", "audio_url", "input_audio", "video_url", "file"})
TENSORS = frozenset({"image_embeds", "audio_embeds", "video_embeds", "prompt_embeds"})


def hold_to(limits: Limits, request: dict[str, Any], *, generates: bool) -> None:
    """Refuse what goes beyond the limits; set the most tokens where the caller has set none. Raises Refusal (400)."""
    if not FORBIDDEN.isdisjoint(request):
        name = min(FORBIDDEN & request.keys())
        raise _refused(f"`{name}` is not a caller's to set", name)
    _check_template(request.get("chat_template_kwargs"))
    for name in ("n", "best_of"):
        _whole(request, name, 1, limits.n)
    _check_prompts(request.get("prompt"), limits.n)
    if generates:
        for name in TOKEN_FIELDS:
            _whole(request, name, 0, limits.max_tokens or MOST_TOKENS)
        if limits.max_tokens is not None and all(request.get(name) is None for name in TOKEN_FIELDS):
            request["max_tokens"] = limits.max_tokens
    for part in _media_in(request.get("messages")):
        _check_media(part, limits)


def _check_template(given: Any) -> None:
    if isinstance(given, dict) and not FORBIDDEN_FOR_TEMPLATE.isdisjoint(given):
        raise _refused("`chat_template_kwargs` may not name a template of its own", "chat_template_kwargs")


def _whole(request: dict[str, Any], name: str, least: int, most: int) -> None:
    given = request.get(name)
    if given is None:
        return
    if not isinstance(given, int) or isinstance(given, bool) or not least <= given <= most:
        raise _refused(f"`{name}` is a whole number from {least} to {most}", name, "limit_exceeded")


def _check_prompts(prompt: Any, most: int) -> None:
    """A list of numbers is one prompt."""
    if isinstance(prompt, list) and len(prompt) > most and not all(isinstance(each, int) for each in prompt):
        raise _refused(f"`prompt` has {len(prompt)} prompts, and may have {most}", "prompt", "limit_exceeded")


def _media_in(messages: Any) -> Iterator[Mapping[str, Any]]:
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in [content] if isinstance(content, dict) else content if isinstance(content, list) else ():
            if isinstance(part, dict) and not _is_text(part):
                yield part


def _is_text(part: Mapping[str, Any]) -> bool:
    kind = part.get("type", "text")
    return isinstance(kind, str) and kind in TEXT and MEDIA.isdisjoint(part) and TENSORS.isdisjoint(part)


def _check_media(part: Mapping[str, Any], limits: Limits) -> None:
    if not limits.media:
        raise _refused("this route takes text only (its limits have no `media: true`)", "messages")
    if str(part.get("type")) in TENSORS or not TENSORS.isdisjoint(part):
        raise _refused("tensors are not taken", "messages")
    if any(_is_address(name, text) for name, text in _texts_in(part)):
        raise _refused("images and sound are taken as data: URLs; addresses are not fetched", "messages")


def _is_address(name: str, text: str) -> bool:
    """The engine would fetch it, from inside our network."""
    head = text[:64].lower()
    return not head.startswith("data:") and (name.endswith("url") or ":" in head)


def _texts_in(part: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, text) of all of it, however deep."""
    left: list[tuple[str, Any]] = list(part.items())
    while left:
        name, value = left.pop()
        if isinstance(value, str):
            yield name, value
        elif isinstance(value, dict):
            left.extend(value.items())
        elif isinstance(value, list):
            left.extend((name, each) for each in value)


def _refused(what: str, param: str, code: str = "invalid_request") -> Refusal:
    return Refusal(400, what, code, param=param)

"""CloudEvents 1.0 over HTTP, as events of our log: one in structured or binary mode, or a batch. Pure."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import unquote_to_bytes

from registry.errors import WrongInput
from registry.event_types import MAX_TEXT, check_event
from registry.events import Event
from serving.http_messages import Refusal
from serving.posted_json import read_json, read_object

STRUCTURED, BATCH = "application/cloudevents+json", "application/cloudevents-batch+json"
JSON = "application/json"
OURS = "ft/"
KEPT = frozenset({"specversion", "id", "source", "type", "subject", "time", "datacontenttype", "data"})
MOST_IN_BATCH = 10_000
MOST_ERRORS = 20
# A sender's clock may be wrong, and feedback of next year would count for every run until then.
MAX_AHEAD_SECONDS = 86400.0


@dataclass(frozen=True)
class Posted:
    """What was posted; `not_kept` names attributes that the log has no place for."""

    events: Sequence[Event]
    not_kept: tuple[str, ...] = ()


def read_events(headers: Mapping[bytes, bytes], body: bytes) -> Posted:
    """All events of a request, or a Refusal (400, 413, 415) with everything that is wrong with them."""
    media = media_type(headers)
    if media == BATCH:
        return _checked(_batch(body))
    if media == STRUCTURED:
        return _checked([read_object(body)])
    if b"ce-specversion" in headers:
        return _checked([_binary(headers, media, body)])
    raise Refusal(
        415,
        f"content-type is {STRUCTURED} or {BATCH}; with {JSON} the event's attributes are in ce-* headers",
        "unsupported_media_type",
    )


def media_type(headers: Mapping[bytes, bytes]) -> str:
    """What content-type names, without parameters. Raises Refusal (415) for another charset than UTF-8."""
    name, *parameters = headers.get(b"content-type", b"").decode("latin-1").lower().split(";")
    for each in parameters:
        key, _, value = each.partition("=")
        if key.strip() == "charset" and value.strip(' "') not in ("utf-8", "utf8", "us-ascii"):
            raise Refusal(415, "the body must be UTF-8", "unsupported_media_type")
    return name.strip()


def _batch(body: bytes) -> list[Any]:
    found = read_json(body)
    if not isinstance(found, list):
        raise Refusal(400, "a batch is a JSON array of events", "invalid_json")
    if len(found) > MOST_IN_BATCH:
        raise Refusal(413, f"a batch has at most {MOST_IN_BATCH} events", "request_too_large")
    return found


def _binary(headers: Mapping[bytes, bytes], media: str, body: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in headers.items():
        if name.startswith(b"ce-"):
            found[name[3:].decode("latin-1")] = _unquoted(name, value)
    if body and media != JSON:
        raise Refusal(415, f"data is a JSON object, so content-type is {JSON}", "unsupported_media_type")
    return {**found, "data": read_json(body) if body else {}}


def _unquoted(name: bytes, value: bytes) -> str:
    try:
        return unquote_to_bytes(value).decode()
    except UnicodeDecodeError:
        raise Refusal(400, f"{name.decode('latin-1')!a} is not UTF-8", "invalid_event") from None


def _checked(found: Sequence[Any]) -> Posted:
    """The events of these JSON values, if none is wrong: a batch is taken whole or not at all."""
    now, events, wrong = time.time(), [], []
    for number, each in enumerate(found):
        try:
            events.append(_event(each, now))
        except WrongInput as error:
            wrong.append(f"event {number}: {error}" if len(found) > 1 else str(error))
            if len(wrong) == MOST_ERRORS:
                break
    if wrong:
        raise Refusal(400, "\n".join(wrong), "invalid_event")
    return Posted(events, tuple(sorted({name[:40] for each in found for name in each if name not in KEPT})))


def _event(found: Any, now: float) -> Event:
    """Raises WrongInput."""
    if not isinstance(found, dict):
        raise WrongInput("an event is a JSON object")
    if found.get("specversion") != "1.0":
        raise WrongInput('specversion must be "1.0"')
    id_, source, type_ = (_text(found, name) for name in ("id", "source", "type"))
    subject = _text(found, "subject") if found.get("subject") is not None else ""
    event = Event(_source(source), id_, type_, subject, _time(found.get("time"), now), _data(found))
    check_event(event)
    return event


def _text(found: Mapping[str, Any], name: str) -> str:
    value = found.get(name)
    if not isinstance(value, str) or not value:
        raise WrongInput(f"{name} must be text, and not empty")
    return value


def _source(text: str) -> str:
    if len(text) > MAX_TEXT or not text.isprintable() or " " in text or text.startswith(OURS):
        raise WrongInput(f"source must be a URI reference that does not begin with {OURS}", place=ascii(text[:40]))
    return text


def _time(text: Any, now: float) -> float:
    if text is None:
        return now
    try:
        found = datetime.fromisoformat(text)
        seconds = found.timestamp()
        datetime.fromtimestamp(seconds, found.tzinfo)
    except (TypeError, ValueError, OverflowError, OSError):
        found = None
    if found is None or found.tzinfo is None:
        raise WrongInput("time must be RFC 3339, like 2026-11-21T09:30:00Z", place=ascii(str(text)[:40]))
    if seconds > now + MAX_AHEAD_SECONDS:
        raise WrongInput("time is more than a day ahead", place=text, fix="set the sender's clock")
    return seconds


def _data(found: Mapping[str, Any]) -> dict[str, Any]:
    if "data_base64" in found:
        raise WrongInput("data_base64 is not taken", fix="send a JSON object as data")
    data = found.get("data")
    if data is not None and not isinstance(data, dict):
        raise WrongInput("data must be a JSON object")
    return data or {}

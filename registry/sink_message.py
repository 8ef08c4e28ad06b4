"""What is sent to a sink: a CloudEvent (structured mode) or the sink's template, signed as Standard Webhooks say.

`webhook-id` is made of the event's source and id, so that it is the same at every attempt; the body is, too.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from dataclasses import dataclass
from urllib.parse import urlsplit

from registry.events import Event, new_event
from registry.sinks import Sink, address_of, filled, headers_of, key_of

CLOUD_EVENT = "application/cloudevents+json; charset=utf-8"


@dataclass(frozen=True)
class Message:
    """One POST, ready to be sent."""

    url: str
    headers: dict[str, str]
    body: bytes


def message(sink: Sink, event: Event, now: float) -> Message:
    """Raises WrongInput if the environment lacks what the sink needs."""
    url, key, more = address_of(sink), key_of(sink), headers_of(sink)
    content = event.as_dict() if sink.template is None else filled(sink.template, event)
    body = json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
    headers = {
        "User-Agent": "ft", **more,
        "Content-Type": CLOUD_EVENT if sink.template is None else "application/json; charset=utf-8",
        "webhook-id": webhook_id(event), "webhook-timestamp": str(int(now)),
    }  # fmt: skip
    if key is not None:
        headers["webhook-signature"] = signature(key, headers["webhook-id"], headers["webhook-timestamp"], body)
    return Message(url, headers, body)


def trial_event(sink: Sink) -> Event:
    """What `ft events sinks --test` sends; it is not in the log."""
    return new_event("ft/cli", "sink.test", sink.name, {"text": f"a test of the sink {sink.name}"})


def webhook_id(event: Event) -> str:
    """A digest: ids from outside may have any characters, a header and the signed text may not."""
    return "ft_" + hashlib.sha256(json.dumps([event.source, event.id]).encode()).hexdigest()[:32]


def signature(key: bytes, id_: str, timestamp: str, body: bytes) -> str:
    signed = hmac.new(key, f"{id_}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(signed).decode()}"


def scrubbed(text: str, sent: Message) -> str:
    """What a receiver or a library said, on one line, without the secrets of the address and the headers."""
    parts = urlsplit(sent.url)
    user = parts.netloc.rpartition("@")[0]
    secrets = [sent.url, f"{parts.path}?{parts.query}", parts.path, parts.query, user, user.partition(":")[2]]
    secrets += [value for name, value in sent.headers.items() if not _is_ours(name)]
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) > 3:
            text = text.replace(secret, "***")
    shown = "".join(each if each.isprintable() else " " for each in text)
    return " ".join(shown.split())[:300]


def _is_ours(name: str) -> bool:
    return name in ("User-Agent", "Content-Type") or name.startswith("webhook-")

"""Sinks: `sinks:` in ft.yaml, where news goes as it happens: a webhook, or a chat's incoming webhook.

A chat's address is a secret, so addresses and keys may come from the environment, and are never printed in full.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import re
from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, JsonValue, StringConstraints, field_validator, model_validator

from registry.errors import WrongInput
from registry.events import Event
from registry.recipe_part import VARIABLE, Part, Text
from registry.triggers import Match, fits

OWN_EVENTS = "sink."
ATTRIBUTES = ("type", "subject", "source", "id", "time", "seq", "cause", "data")
PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
NAME = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*")
HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
OURS = {"content-type", "content-length", "transfer-encoding", "host", "connection"}
KEY_PREFIX = "whsec_"
MAKE_KEY = "make one: echo whsec_$(openssl rand -base64 32)"

SinkName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
Variable = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


def _address(url: str) -> str:
    """The reason never repeats the address: its path is the secret."""
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        fine = False
    if not fine or not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError("an address begins with http:// or https:// and a host, without spaces")
    return url


class Sink(Part):
    """Where events of these types are sent, and as what."""

    name: SinkName = Field(description="Its name, for `ft events sinks`", examples=["team-chat"])
    url: Annotated[str, AfterValidator(_address)] | None = Field(None, description="The address")
    url_env: Variable | None = Field(None, description="The environment variable that has the address, if it is secret")
    types: list[str] = Field(min_length=1, description="Types of events; `*` stands for anything", examples=["run.*"])
    where: dict[Text, str | int | float | bool] = Field(
        {}, description="subject, source or keys of the data (a.b for one in another), each with the value it must have"
    )
    secret_env: Variable | None = Field(
        None, description="The variable that has the signing key (whsec_...), for Standard Webhooks signatures"
    )
    template: dict[str, JsonValue] | None = Field(
        None, description="The JSON that is sent instead of the CloudEvent; `{subject}`, `{data.state}` are filled in",
        examples=[{"text": "{type} {subject}: {data.state}"}],
    )  # fmt: skip
    timeout: float = Field(10, gt=0, le=60, description="Seconds for the whole exchange")
    headers: dict[str, str] = Field({}, description="More headers; ${VAR} in their values is the environment's")

    @property
    def matches(self) -> list[Match]:
        return [Match(type=each, where=self.where) for each in self.types]

    @field_validator("types")
    @classmethod
    def _known_types(cls, types: list[str]) -> list[str]:
        for each in types:
            Match(type=each)
        return types

    @field_validator("template")
    @classmethod
    def _fillable(cls, template: dict[str, JsonValue] | None) -> dict[str, JsonValue] | None:
        json.dumps(template, allow_nan=False)
        _each_text(template, _check_placeholders)
        return template

    @field_validator("headers")
    @classmethod
    def _sendable(cls, headers: dict[str, str]) -> dict[str, str]:
        for name, value in headers.items():
            if not HEADER.fullmatch(name) or not _is_header_value(value):
                raise ValueError(f"no header: {name!r}; its value is printable ASCII on one line")
            if name.lower() in OURS or name.lower().startswith("webhook-"):
                raise ValueError(f"{name} is set by ft itself")
        return headers

    @model_validator(mode="after")
    def _one_address(self) -> Sink:
        if (self.url is None) == (self.url_env is None):
            raise ValueError("give url, or url_env: the environment variable that has it")
        return self


def wants(sink: Sink, event: Event) -> bool:
    """Is the event for this sink? Never what is told of the sink itself, which it could not be told."""
    if event.type.startswith(OWN_EVENTS) and event.subject == sink.name:
        return False
    return any(fits(each, event) for each in sink.matches)


def address_of(sink: Sink) -> str:
    """Raises WrongInput if the environment has none."""
    if sink.url is not None:
        return sink.url
    assert sink.url_env is not None
    try:
        return _address(_from_environment(sink, sink.url_env))
    except ValueError as error:
        raise WrongInput(str(error), place=_place(sink, sink.url_env), fix="set it in the environment or in .env"
                         ) from None  # fmt: skip


def key_of(sink: Sink) -> bytes | None:
    """The key that its messages are signed with, 24 to 64 bytes; None: they are not signed. Raises WrongInput."""
    if sink.secret_env is None:
        return None
    place, text = _place(sink, sink.secret_env), _from_environment(sink, sink.secret_env)
    try:
        key = base64.b64decode(text.removeprefix(KEY_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not text.startswith(KEY_PREFIX) or not 24 <= len(key) <= 64:
        raise WrongInput(f"no signing key: one is {KEY_PREFIX} and 24 to 64 bytes in base64", place=place, fix=MAKE_KEY)
    return key


def headers_of(sink: Sink) -> dict[str, str]:
    """The sink's own headers, with the environment's values. Raises WrongInput."""
    found = {}
    for name, value in sink.headers.items():
        full = VARIABLE.sub(lambda variable: _from_environment(sink, variable[1]), value)
        if not _is_header_value(full):
            raise WrongInput(f"the value of header {name} is printable ASCII on one line", place=_place(sink, name))
        found[name] = full
    return found


def masked(url: str) -> str:
    """The address without what is secret in it."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{'/***' if len(parts.path) > 1 or parts.query else ''}"


def digest_of(url: str) -> str:
    """Stands for the address where it is noted that it wants nothing more: another address is another digest."""
    return hashlib.sha256(url.encode()).hexdigest()[:16]


def filled(template: Mapping[str, JsonValue], event: Event) -> Any:
    """The template with the event's values in its texts."""
    attributes = {**event.as_dict(), "seq": event.seq, "cause": event.cause}
    return _each_text(template, lambda text: PLACEHOLDER.sub(lambda found: _shown(found, attributes), text))


def _shown(found: re.Match[str], attributes: dict[str, Any]) -> str:
    if found[1] is None:
        return found[0][0]
    value: Any = attributes
    for part in found[1].split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if value is None:
        return ""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return _without_calls(text if len(text) <= 500 else text[:499] + "…")


def _without_calls(text: str) -> str:
    """Values come from outside too, and must not call a whole channel; `model@3` stays as it is."""
    return re.sub(r"@(?=(?:channel|here|everyone|all)\b)|<(?=[!@#])", "\\g<0>\u200b", text, flags=re.IGNORECASE)


def _check_placeholders(text: str) -> str:
    for found in PLACEHOLDER.finditer(text):
        name = found[1]
        if found[0] in ("{{", "}}"):
            continue
        if name is None:
            raise ValueError(f"a brace alone in {text!r}; write {{{{ or }}}} for one")
        if not NAME.fullmatch(name) or name.partition(".")[0] not in ATTRIBUTES:
            raise ValueError(f"no placeholder: {{{name}}}; there is {', '.join(ATTRIBUTES)}, and data.KEY")
    return text


def _each_text(value: Any, change: Any) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _each_text(each, change) for name, each in value.items()}
    return [_each_text(each, change) for each in value] if isinstance(value, list) else value


def _from_environment(sink: Sink, name: str) -> str:
    if not os.environ.get(name):
        raise WrongInput("is not set", place=_place(sink, name), fix="set it in the environment or in .env")
    return os.environ[name]


def _place(sink: Sink, name: str) -> str:
    return f"sink {sink.name}: {name}"


def _is_header_value(text: str) -> bool:
    return text.isascii() and text.isprintable()

"""`POST /v1/feedback`: what somebody says of an answer, as a `feedback.received` event. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from registry.errors import WrongInput
from registry.event_types import MAX_TEXT, check_event
from registry.events import Event, new_event
from serving.cloudevents import JSON, media_type
from serving.http_messages import Refusal

SOURCE = "ft/feedback"
Short = Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]


class Feedback(BaseModel):
    """`adapter` and `request` are the answer's headers x-ft-adapter and x-request-id."""

    model_config = ConfigDict(extra="forbid", strict=True)

    adapter: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}@[1-9][0-9]{0,8}$", description="model@N")
    rating: float | None = Field(None, allow_inf_nan=False)
    correction: str | None = None
    tags: list[Short] | None = Field(None, max_length=32)
    request: Short | None = None
    id: Short | None = Field(None, description="the same id is the same feedback, however often it is posted")

    @model_validator(mode="after")
    def _says_something(self) -> Feedback:
        if self.rating is None and self.correction is None and not self.tags:
            raise ValueError("give a rating, a correction or tags")
        return self


def read_feedback(
    headers: Mapping[bytes, bytes], given: dict[str, Any], adapter_of: Callable[[str], str | None] = lambda _: None
) -> Event:
    """Raises Refusal (400, 404, 415) with everything that is wrong. `adapter_of` a request, where that is known."""
    # Any web page may post a form or plain text to loopback; for JSON its browser asks first, and is told no.
    if media_type(headers) != JSON:
        raise Refusal(415, f"content-type must be {JSON}", "unsupported_media_type")
    if "adapter" not in given and isinstance(given.get("request"), str):
        given = {**given, "adapter": _adapter(given["request"], adapter_of)}
    try:
        found = Feedback(**given)
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, each['loc'])) or 'body'}: {each['msg']}" for each in error.errors()[:20]]
        raise Refusal(400, "\n".join(wrong), "invalid_event") from None
    data = found.model_dump(exclude_none=True, exclude={"adapter", "id"})
    event = new_event(SOURCE, "feedback.received", found.adapter, data, key=found.id or "")
    try:
        check_event(event)
    except WrongInput as error:
        raise Refusal(400, str(error), "invalid_event") from None
    return event


def _adapter(request: str, adapter_of: Callable[[str], str | None]) -> str:
    found = adapter_of(request)
    if found is None:
        what = f"no answer {request[:64]!r} is remembered here: send `adapter` too, the answer's header x-ft-adapter"
        raise Refusal(404, what, "unknown_request", param="request")
    if "@" not in found:
        what = f"that answer came from {found[:100]}: feedback is taken on versions of registered models (model@N)"
        raise Refusal(400, what, "invalid_event", param="request")
    return found

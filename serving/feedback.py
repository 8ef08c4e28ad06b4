"""`POST /v1/feedback`: what somebody says of an answer, as a `feedback.received` event. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from registry.event_types import MAX_TEXT
from registry.events import Event, new_event
from serving.cloudevents import JSON, media_type
from serving.http_messages import Refusal
from serving.posted_json import read_object

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


def read_feedback(headers: Mapping[bytes, bytes], body: bytes) -> Event:
    """Raises Refusal (400, 415) with everything that is wrong."""
    # Any web page may post a form or plain text to loopback; for JSON its browser asks first, and is told no.
    if media_type(headers) != JSON:
        raise Refusal(415, f"content-type must be {JSON}", "unsupported_media_type")
    try:
        found = Feedback(**read_object(body))
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, each['loc'])) or 'body'}: {each['msg']}" for each in error.errors()[:20]]
        raise Refusal(400, "\n".join(wrong), "invalid_event") from None
    data = found.model_dump(exclude_none=True, exclude={"adapter", "id"})
    return new_event(SOURCE, "feedback.received", found.adapter, data, key=found.id or "")

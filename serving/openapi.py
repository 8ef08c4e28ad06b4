"""The gateway's surface as an OpenAPI 3.1 description, served at GET /openapi.json. Data only; what it says is fuzzed.

Requests and answers have many more fields than are named here: what the gateway does not know it passes on, both ways.
"""

from __future__ import annotations

from typing import Any

from serving.feedback import Feedback

Described = dict[str, Any]

VERSION = "1"
STREAM = "text/event-stream"
# What may go wrong, and what the caller then reads. An engine's own refusals (400, 404, 422) are passed on.
PROBLEMS = {
    "400": "Not a request that can be answered: no JSON, a field of the wrong kind, beyond a limit",
    "401": "A key is needed, or this one is not known",
    "403": "The key does not reach this route",
    "404": "No such model; the message has the nearest names",
    "408": "The body did not arrive in time",
    "413": "The body is too large",
    "415": "The body is not application/json",
    "422": "The engine cannot do what was asked",
    "429": "Too much at once; Retry-After says when to try again",
    "500": "Something failed that should not; x-request-id finds it in the log",
    "502": "The engine's answer was not one",
    "503": "What should answer is away; Retry-After says when to try again",
    "504": "The engine took too long",
}
ANSWERING = ("400", "401", "403", "404", "408", "413", "415", "422", "429", "500", "502", "503", "504")
LOOKING = ("401", "403", "404", "429", "503")


def openapi() -> Described:
    """The whole description; a new one each time."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "ft gateway", "version": VERSION, "description": "OpenAI-compatible; docs/serving.md"},
        "security": [{}, {"key": []}],
        "paths": {
            "/v1/chat/completions": {"post": _asks("chat", "ChatRequest", "ChatAnswer", streams=True)},
            "/v1/completions": {"post": _asks("complete", "CompletionRequest", "CompletionAnswer", streams=True)},
            "/v1/embeddings": {"post": _asks("embed", "EmbeddingRequest", "EmbeddingAnswer")},
            "/v1/feedback": {"post": _asks("feedback", "FeedbackRequest", "FeedbackAnswer")},
            "/v1/models": {"get": _looks("models", "Public names and where each leads", _json("Models"))},
            "/health": {"get": _looks("health", "Does anything answer?", _json("Health"))},
            "/metrics": {"get": _looks("metrics", "For Prometheus", {"text/plain": {"schema": {"type": "string"}}})},
            "/openapi.json": {"get": _looks("openapi", "This description", {"application/json": {"schema": OBJECT}})},
        },
        "components": {
            "schemas": _schemas(),
            "headers": {
                "RequestId": {"description": "The caller's, if it sent a plain one", "schema": _text(pattern=PLAIN)},
                "Adapter": {"description": "The version that answers, model@N", "schema": _text()},
                "RetryAfter": {"description": "Seconds", "schema": {"type": "integer", "minimum": 0}},
            },
            "parameters": {
                "RequestId": {"name": "x-request-id", "in": "header", "schema": _text(pattern=PLAIN)},
            },
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }  # fmt: skip


OBJECT: Described = {"type": "object"}
PLAIN = "^[A-Za-z0-9._-]{1,64}$"


def _asks(name: str, request: str, answer: str, *, streams: bool = False) -> Described:
    content = _json(answer)
    if streams:
        content[STREAM] = {}  # events of the same fields, in pieces
    found = {"description": "The answer, as it comes if `stream` is true", "content": content, "headers": {
        **_named("RequestId"), "x-ft-adapter": {"$ref": "#/components/headers/Adapter"}}}  # fmt: skip
    return {
        "operationId": name,
        "parameters": [{"$ref": "#/components/parameters/RequestId"}],
        "requestBody": {"required": True, "content": _json(request)},
        "responses": {"200": found, **{status: _problem(status) for status in ANSWERING}},
    }


def _looks(name: str, what: str, content: Described) -> Described:
    found = {"description": what, "content": content, "headers": _named("RequestId")}
    away = {status: _problem(status) for status in LOOKING}
    if name == "health":
        away["503"] = {"description": "Nothing answers now; the reasons", "content": _json("Health")}
    return {
        "operationId": name,
        "parameters": [{"$ref": "#/components/parameters/RequestId"}],
        "responses": {"200": found, **away},
    }


def _problem(status: str) -> Described:
    headers = _named("RequestId", "RetryAfter") if status in ("429", "503") else _named("RequestId")
    return {"description": PROBLEMS[status], "content": _json("Error"), "headers": headers}


def _named(*names: str) -> Described:
    written = {"RequestId": "x-request-id", "RetryAfter": "retry-after"}
    return {written[name]: {"$ref": f"#/components/headers/{name}"} for name in names}


def _json(schema: str) -> Described:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}


def _text(**more: Any) -> Described:
    return {"type": "string", **more}


def _or_null(*kinds: str, **more: Any) -> Described:
    return {"type": [*kinds, "null"], **more}


def _listed(items: Described, **more: Any) -> Described:
    return {"type": "array", "items": items, **more}


def _object(required: tuple[str, ...] = (), /, **properties: Described) -> Described:
    return {"type": "object", "required": list(required), "properties": properties, "additionalProperties": True}


def _schemas() -> Described:
    model = _text(minLength=1, maxLength=256, description="A public name (GET /v1/models), or model@N")
    usage = _object(prompt_tokens={"type": "integer"}, total_tokens={"type": "integer"})
    answer = {"model": _text(), "usage": usage, "choices": _listed(OBJECT)}
    content = {"anyOf": [_or_null("string"), _listed(OBJECT)]}
    message = _object(("role",), role=_text(minLength=1), content=content)
    sampling = _sampling()
    texts = {"anyOf": [_text(), _listed(_text(), minItems=1), _listed({"type": "integer", "minimum": 0}, minItems=1)]}
    return {
        "ChatRequest": _object(
            ("model", "messages"), model=model, messages=_listed(message, minItems=1), **sampling,
            max_completion_tokens=_or_null("integer", minimum=1), tools=_or_null("array", items=OBJECT),
            response_format=_or_null("object"),
        ),
        "CompletionRequest": _object(("model", "prompt"), model=model, prompt=texts, **sampling),
        "EmbeddingRequest": _object(
            ("model", "input"), model=model, input=texts, encoding_format={"enum": ["float", "base64"]}
        ),
        # The adapter is known of a request that was answered here.
        "FeedbackRequest": {**Feedback.model_json_schema(), "required": []},
        "ChatAnswer": _object(("choices",), **answer),
        "CompletionAnswer": _object(("choices",), **answer),
        "EmbeddingAnswer": _object(("data",), data=_listed(OBJECT), model=_text()),
        "FeedbackAnswer": _object(("id", "adapter"), id=_text(), adapter=_text()),
        "Models": _object(("object", "data"), object={"const": "list"}, data=_listed(_object(("id",), id=_text()))),
        "Health": _object(("status",), status={"enum": ["ok", "away"]}, generation={"type": "integer"}),
        "Error": _object(("error",), error=_object(
            ("message", "type"), message=_text(), type=_text(), param=_or_null("string"),
            code=_or_null("string", "integer"),
        )),
    }  # fmt: skip


def _sampling() -> Described:
    """What chat and plain completions share. Limits are the route's own, so no maximum stands here."""
    return {
        "stream": _or_null("boolean"),
        "stream_options": _or_null("object", properties={"include_usage": _or_null("boolean")}),
        "n": _or_null("integer", minimum=1),
        "max_tokens": _or_null("integer", minimum=1),
        "temperature": _or_null("number", minimum=0, maximum=2),
        "top_p": _or_null("number", minimum=0, maximum=1),
        "seed": _or_null("integer"),
        "stop": {"anyOf": [_or_null("string"), _listed(_text(), maxItems=4)]},
        "user": _or_null("string"),
    }

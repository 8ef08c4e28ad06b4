"""The receiver's HTTP, as a raw ASGI app: who may come in, and what goes into the inbox. It only appends events.

It answers when the events are committed, so what got a 200 is in the log, and what got anything else can be sent again.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from registry.errors import WrongInput
from registry.event_types import check_event
from registry.events import Event
from registry.settings import Settings
from serving import github_hooks, mlflow_hooks
from serving.cloudevents import read_events
from serving.feedback import read_feedback
from serving.http_messages import (
    ClientGone,
    Receive,
    Refusal,
    Scope,
    Send,
    read_body,
    rinse,
    send_json,
    send_refusal,
)
from serving.inbox import Inbox
from serving.listening import is_loopback
from serving.posted_json import read_object
from serving.refusals import Refusals

# Where to post, and how a refusal there is called in the log.
DOORS = {"/v1/events": "events", "/v1/feedback": "events", "/hooks/github": "github", "/hooks/mlflow": "mlflow"}
HEALTH = "/healthz"

Given = Mapping[bytes, bytes]
Answer = dict[str, Any]


class Receiver:
    """An ASGI 3 app."""

    def __init__(self, inbox: Inbox, settings: Settings) -> None:
        self._inbox, self._settings = inbox, settings
        self._bearer = f"Bearer {settings.receiver_token}".encode()
        self._telling: set[asyncio.Task[None]] = set()
        self._refusals = Refusals(self._tell)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        try:
            await send_json(send, 200, await self._answer(scope, receive), [])
        except Refusal as refusal:
            self._note(scope, refusal)
            await send_refusal(send, refusal, [], lambda: rinse(receive))
        except ClientGone:
            pass

    async def close(self) -> None:
        """Tell of the refusals that were not told of yet."""
        self._refusals.close()
        await asyncio.gather(*self._telling, return_exceptions=True)

    async def _answer(self, scope: Scope, receive: Receive) -> Answer:
        path, method, given = scope["path"], scope["method"], _first_of_each(scope)
        if path not in DOORS and path != HEALTH:
            raise Refusal(404, f"nothing answers at {path[:200]}", "not_found")
        if method != (takes := "GET" if path == HEALTH else "POST"):
            raise Refusal(405, f"{path} takes {takes}", "method_not_allowed", allow=takes)
        if path == HEALTH:
            return {"status": "ok", "store": "failing" if self._inbox.failure else "ok"}
        self._let_in(path, given)
        body = await read_body(scope, receive, self._settings.receiver_max_body)
        return await self._take(path, given, body)

    def _let_in(self, path: str, given: Given) -> None:
        """Before the body is read. Raises Refusal (401, 403)."""
        settings = self._settings
        if path.startswith("/v1/"):
            self._check_token(given)
        elif path == "/hooks/github" and not settings.github_secret:
            raise Refusal(403, "GitHub's webhooks are not taken: FT_GITHUB_SECRET is not set", "no_secret")
        elif path == "/hooks/mlflow" and not settings.mlflow_webhook_secret:
            raise Refusal(403, "MLflow's webhooks are not taken: FT_MLFLOW_WEBHOOK_SECRET is not set", "no_secret")

    def _check_token(self, given: Given) -> None:
        if self._settings.receiver_token:
            if not secrets.compare_digest(given.get(b"authorization", b""), self._bearer):
                raise Refusal(401, "Authorization: Bearer is missing or wrong", "wrong_token")
        elif not _is_local(given.get(b"host", b"")):
            # A tunnel, or a web page whose name was made to lead to loopback.
            raise Refusal(403, "called by a name that is not this machine's: set FT_RECEIVER_TOKEN", "no_token")

    async def _take(self, path: str, given: Given, body: bytes) -> Answer:
        if path == "/v1/events":
            posted = read_events(given, body)
            not_kept = {"not_kept": list(posted.not_kept)} if posted.not_kept else {}
            return {**await self._append(posted.events), **not_kept}
        if path == "/v1/feedback":
            return await self._append([_checked(read_feedback(given, read_object(body)))])
        if path == "/hooks/mlflow":
            mlflow_hooks.check_signature(self._settings.mlflow_webhook_secret, given, body, time.time())
            return await self._append([_checked(mlflow_hooks.read_delivery(given, body))])
        github_hooks.check_signature(self._settings.github_secret, given, body)
        event = github_hooks.read_delivery(given, body)
        return await self._append([_checked(event)]) if event else {"pong": True}

    async def _append(self, events: Sequence[Event]) -> Answer:
        new = await self._inbox.append(events)
        return {"appended": sum(new), "known": len(new) - sum(new)}

    def _note(self, scope: Scope, refusal: Refusal) -> None:
        """Who posts events hears what is wrong with them; nobody looks at what a hook was answered."""
        door = DOORS.get(scope["path"])
        if door is None or refusal.status in (405, 503) or (door == "events" and refusal.status not in (401, 403)):
            return
        given = _first_of_each(scope)
        delivery = given.get(github_hooks.DELIVERY) or given.get(mlflow_hooks.DELIVERY) or b""
        client = scope.get("client") or ("",)
        self._refusals.note(door, refusal, delivery.decode("latin-1"), str(client[0]))

    def _tell(self, event: Event) -> None:
        print(f"refused: {event.subject}: {event.data['reason']} ({event.data['count']} times)", flush=True)
        task = asyncio.create_task(self._append_quietly(event))
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def _append_quietly(self, event: Event) -> None:
        with suppress(Refusal):  # the inbox has said why
            await self._inbox.append([event])


def _checked(event: Event) -> Event:
    try:
        check_event(event)
    except WrongInput as error:
        raise Refusal(400, str(error), "invalid_event") from None
    return event


def _first_of_each(scope: Scope) -> dict[bytes, bytes]:
    return dict(reversed(scope["headers"]))


def _is_local(host: bytes) -> bool:
    name = host.decode("latin-1")
    return is_loopback(name[: name.find("]") + 1] if name.startswith("[") else name.partition(":")[0])

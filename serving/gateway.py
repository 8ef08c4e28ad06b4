"""The gateway: OpenAI-compatible HTTP in front of the engines, as a raw ASGI app.

Who calls, what is asked, which route, within which limits, in which turn; then the chain has it answered.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

from registry.events import Event
from registry.serve_recipe import RouteTerms
from serving.answers import Outgoing, Remembered
from serving.ask import Ask
from serving.callers import Caller, Callers
from serving.chain import HOLD_SECONDS, Chain
from serving.engine import BASE
from serving.feedback import read_feedback
from serving.http_messages import (
    ClientGone,
    Headers,
    Receive,
    Refusal,
    Scope,
    Send,
    header,
    read_body,
    request_id,
    rinse,
    send_json,
    send_refusal,
)
from serving.limits import hold_to
from serving.metrics import Metrics
from serving.metrics_page import answer_metrics, is_here
from serving.openapi import openapi
from serving.policy import Policy
from serving.posted_json import read_object
from serving.queueing import Full, Places, Room
from serving.routes import Board
from serving.rules import Question

GENERATING = frozenset({"/v1/chat/completions", "/v1/completions"})
ASKING = GENERATING | {"/v1/embeddings"}
FEEDBACK = "/v1/feedback"
ANSWERS = {
    **dict.fromkeys(("/health", "/openapi.json", "/metrics", "/v1/models"), "GET"),
    **dict.fromkeys((*ASKING, FEEDBACK), "POST"),
}
FEEDBACK_BODY = 1 << 20
GONE = 499

Append = Callable[[Sequence[Event]], Awaitable[list[bool]]]


@dataclass
class Hooks:
    """Other parts of the server: `metrics`, `append` (events into the log), `log` (of requests)."""

    metrics: Metrics | None = None
    append: Append | None = None
    log: Callable[[Ask, Outgoing], None] | None = None


class Gateway:
    """An ASGI 3 app. `internal_key` opens versions that no gate has passed, and the bare base.

    `policy` may be replaced at any time; a request that is under way ends with what it began with.
    """

    def __init__(
        self, board: Board, internal_key: str, hold_seconds: float = HOLD_SECONDS, *, chain: Chain | None = None,
        policy: Policy | None = None, callers: Callers | None = None, hooks: Hooks | None = None,
    ) -> None:  # fmt: skip
        self.board, self.chain = board, chain or Chain(board, hold_seconds)
        self.callers = callers or Callers(internal_key)
        self.hooks = hooks or Hooks()
        self.remembered = Remembered()
        self.room = Room()
        self._places: dict[str, Places] = {}
        self.policy = policy or Policy()
        self.chain.names = lambda: [*self.policy.routes]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers: Headers = [(b"x-request-id", request_id(scope))]
        try:
            await self._answer(scope, receive, send, headers)
        except Refusal as refusal:
            await send_refusal(send, refusal, headers, lambda: rinse(receive))
        except ClientGone:
            pass
        except Exception:
            # A defect of ours. Who has got a part of an answer already loses the connection: uvicorn refuses a second.
            print(f"request {headers[0][1].decode()}: {traceback.format_exc()}", flush=True)
            with suppress(RuntimeError):
                await send_refusal(send, Refusal(500, "a defect of the gateway; its log has more", "defect"), headers)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, headers: Headers) -> None:
        path, method = scope["path"], scope["method"]
        if path not in ANSWERS:
            raise Refusal(404, f"nothing answers at {path[:200]}", "not_found")
        if method != ANSWERS[path]:
            raise Refusal(405, f"{path} takes {ANSWERS[path]}", "method_not_allowed", allow=ANSWERS[path])
        if path in ASKING:
            await self._ask(scope, receive, send, headers)
        elif path == FEEDBACK:
            await self._take_feedback(scope, receive, send, headers)
        elif path == "/v1/models":
            await send_json(send, 200, self._models(self._caller(scope)), headers)
        elif path == "/metrics":
            await self._metrics(scope, send, headers)
        elif path == "/health":
            await self._health(scope, send, headers)
        else:
            await send_json(send, 200, openapi(), headers)

    async def _ask(self, scope: Scope, receive: Receive, send: Send, headers: Headers) -> None:
        """A request for a model."""
        caller = self._caller(scope)
        self.callers.charge(caller)
        policy = self.policy
        with self.room.taken() as grow:
            body = await read_body(scope, receive, policy.body_limit, grow)
            ask = self._led(scope, read_object(body), caller, policy, headers)
            if len(body) > ask.terms.limits.body_mb * (1 << 20):
                raise Refusal(413, f"the body is larger than {ask.terms.limits.body_mb:g} MiB", "request_too_large")
            hold_to(ask.terms.limits, ask.request, generates=ask.path in GENERATING)
            await self._while_client_is_there(receive, lambda: self._counted(ask, send))

    def _caller(self, scope: Scope) -> Caller:
        return self.callers.who(header(scope, b"authorization"), required=self.policy.keys_required)

    def _led(self, scope: Scope, request: dict[str, Any], caller: Caller, policy: Policy, headers: Headers) -> Ask:
        """Which route it is for. Raises Refusal for a model that is none, and for one that the key may not ask."""
        asked = request.get("model")
        if not isinstance(asked, str) or not asked:
            raise Refusal(400, "`model` must be a name; GET /v1/models lists them", "invalid_model", param="model")
        name, at, pin = asked.partition("@")
        if at and not pin:
            raise self.board.routes.unknown(asked, policy.routes, caller.may)
        pin = pin or header(scope, b"x-ft-version").decode("latin-1").strip()
        route = name
        if policy.rules.concern(name):
            question = Question(name, request, _texts(scope) if policy.rules.read_headers else {}, caller.name)
            route, _, _ = policy.led(question)
        if not (caller.internal or caller.may(name) or caller.may(route)):
            may = ", ".join(sorted(caller.routes or ()))
            raise Refusal(403, f"this key may not ask {asked[:100]!r}; it may ask: {may}", "model_not_allowed",
                          param="model")  # fmt: skip
        terms = policy.terms(route)
        if terms is None:
            raise self.board.routes.unknown(asked, policy.routes, caller.may)
        if pin:
            terms = _pinned(terms, route, pin[:32])
        if self._is_known(route):  # never a caller's own words in a header
            headers.append((b"x-ft-route", route.encode()))
        user, conversation = request.get("user"), header(scope, b"x-ft-conversation").decode("latin-1")
        return Ask(scope["path"], request, asked, route, terms, caller.internal, headers, caller.name,
                   user if isinstance(user, str) else "", conversation, caller.may)  # fmt: skip

    def _is_known(self, route: str) -> bool:
        return route in self.policy.routes or self.board.routes.knows(route)

    async def _counted(self, ask: Ask, send: Send) -> None:
        """Have it answered when it is its turn, and count it whatever becomes of it."""
        began = self.hooks.metrics.begin(ask.route, ask.key) if self.hooks.metrics else None
        going = Outgoing(send, began)
        status, code = GONE, ""
        try:
            await self._in_turn(ask, going)
            status, code = going.status, going.code
        except Refusal as refusal:
            status, code = refusal.status, refusal.code
            raise
        finally:
            if going.complete:  # uvicorn says "disconnected" as soon as the last byte is out, too
                status, code = going.status, going.code
            going.status, going.code = status, code
            if began:
                began.done(status, going.adapter, going.events, going.usage, code)
            if going.adapter:
                self.remembered.put(ask.key, ask.headers[0][1].decode(), going.adapter)
            if self.hooks.log:
                self.hooks.log(ask, going)

    async def _in_turn(self, ask: Ask, send: Send) -> None:
        """A route without a place left still has its fallbacks, which answer elsewhere."""
        try:
            async with self._place(ask):
                await self.chain.answer(ask, send)
        except Full:
            if not ask.terms.fallbacks:
                raise
            await self.chain.answer(ask, send, skip=1)

    def _place(self, ask: Ask) -> Any:
        """Of its route; of names that are none there is one for all, since a caller could make up any number."""
        name = ask.route if self._is_known(ask.route) else ""
        places = self._places.get(name)
        if places is None:
            around = self.hooks.metrics.queued if self.hooks.metrics else nullcontext
            places = self._places[name] = Places(name, ask.terms.limits, around)
        elif places.limits is not ask.terms.limits:
            places.limit_to(ask.terms.limits)
        return places.place()

    async def _while_client_is_there(self, receive: Receive, work: Callable[[], Awaitable[None]]) -> None:
        """Do the work; when the client goes away, cancel it, and with it the engine's generation."""
        working, gone = asyncio.current_task(), False
        assert working is not None

        async def watch() -> None:
            nonlocal gone
            while (await receive())["type"] != "http.disconnect":
                pass
            gone = True
            working.cancel()

        # In this task, not in one of its own: a request costs a fifth less so.
        watching = asyncio.create_task(watch())
        try:
            await work()
        except asyncio.CancelledError:
            if not gone or working.uncancel():  # somebody else's word counts as well
                raise
            raise ClientGone from None
        finally:
            watching.cancel()

    async def _take_feedback(self, scope: Scope, receive: Receive, send: Send, headers: Headers) -> None:
        caller = self._caller(scope)
        self.callers.charge(caller)
        if self.hooks.append is None:
            raise Refusal(503, "feedback is not taken here", "no_store", retry_after=60)
        given = read_object(await read_body(scope, receive, FEEDBACK_BODY))
        event = read_feedback(dict(scope["headers"]), given, lambda request: self._adapter_of(caller, request))
        self._refuse_others(caller, event)
        [new] = await self.hooks.append([event])
        if new and self.hooks.metrics and event.subject in self.board.routes.internal:
            self.hooks.metrics.rated(event.subject, event.data.get("rating"))
        body = {"id": event.id, "adapter": event.subject, "appended": int(new), "known": int(not new)}
        await send_json(send, 200, body, headers)

    def _refuse_others(self, caller: Caller, event: Event) -> None:
        """Feedback starts runs and ends canaries, so a key rates only what it may ask. Raises Refusal (403)."""
        model, own = event.subject.partition("@")[0], self._adapter_of(caller, event.data.get("request", ""))
        if own != event.subject and not self.policy.may_lead(caller.routes, model):
            raise Refusal(403, f"this key may not ask {model}, nor rate it", "model_not_allowed", param="adapter")

    def _adapter_of(self, caller: Caller, request: str) -> str | None:
        """Of the caller's own requests: their ids are the callers' words, and two may have the same."""
        return self.remembered.get(caller.name, request)

    async def _metrics(self, scope: Scope, send: Send, headers: Headers) -> None:
        if self.hooks.metrics is None:
            raise Refusal(404, "nothing is counted here", "not_found")
        internal = self.callers.is_internal(header(scope, b"authorization"))
        await answer_metrics(self.hooks.metrics, scope, send, headers, internal=internal)

    async def _health(self, scope: Scope, send: Send, headers: Headers) -> None:
        routes = self.board.routes
        # One model that was refused is no reason to take the whole gateway out of service.
        on_demand = any(each.engine for each in routes.away.values())  # off is as it should be
        by_recipe = (self.chain.can_answer(name, terms) for name, terms in self.policy.routes.items())
        status = 200 if routes.internal or routes.public or on_demand or any(by_recipe) else 503
        body: dict[str, Any] = {"status": "ok" if status == 200 else "away", "generation": routes.generation}
        if is_here(scope):  # they name models, and strangers need no key here
            body["reasons"] = sorted({each.reason for each in routes.away.values()})
        await send_json(send, status, body, headers)

    def _models(self, caller: Caller) -> dict[str, Any]:
        public = self.policy.public(self.board.routes)
        data = [
            {"id": name, "object": "model", "created": 0, "owned_by": "ft", "root": adapter or name, "parent": BASE}
            for name, adapter in public.items()
            if caller.internal or caller.may(name.partition("@")[0])
        ]
        return {"object": "list", "data": data}


def _texts(scope: Scope) -> Mapping[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


def _pinned(terms: RouteTerms, route: str, version: str) -> RouteTerms:
    """That version or none: nobody else answers for it."""
    if terms.model is None:
        raise Refusal(404, f"{route} is no registered model's, so it has no versions", "model_not_found", param="model")
    return terms.model_copy(
        update={"model": f"{terms.model}@{version}", "fallbacks": [], "openai": None, "provider": "local"}
    )

"""Who answers a request: where its route leads, and whoever is asked when that one does not answer.

Candidates are the route's own target, then its `fallbacks`, in turn. Once a byte of an answer has gone out nobody else
is asked: a caller gets a clean error, never a second answer glued to the first. When nobody has answered, what is only
away for a moment (an engine that restarts, a swap) is waited for, and asked once more.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

from registry.durations import seconds
from registry.serve_recipe import RouteTerms
from serving.ask import Ask
from serving.breakers import BOUNDS, Bounds, Breaker, Breakers, State, Ticket
from serving.http_messages import Refusal, Send
from serving.passing import Attempt, Unanswered, pass_on
from serving.providers import Providers, for_openai
from serving.routes import Away, Board, Route, Upstream
from serving.rules import last_message
from serving.structured import HELD_PATHS, Held, answer_held
from serving.targets import Target, label_of, targets_of

HOLD_SECONDS = 5.0
LOOK_SECONDS = 0.25
# The same candidate is asked so often, of which at most once after it broke.
ASKS = 2
# An answer that took longer than its route allows is no fault of its engine.
TOO_LONG = 504


class Counts(Protocol):
    """What is counted here (serving/metrics.py)."""

    def fell_back(self, route: str, upstream: str) -> None: ...

    def breaker(self, upstream: str, state: str) -> None: ...

    def repaired(self, route: str, ok: bool) -> None: ...


@dataclass(slots=True)
class Turn:
    """One request on its way through its candidates. Of each place that failed: why, and who was asked last; `asked`
    counts how often somebody was."""

    ask: Ask
    send: Send
    until: float
    targets: list[Target]
    held: Held | None
    waited_from: float = 0.0
    # All have been asked, and failed.
    is_second: bool = False
    failed: dict[int, Unanswered] = field(default_factory=dict)
    broken: dict[int, Upstream] = field(default_factory=dict)
    asked: dict[int, int] = field(default_factory=dict)


class Chain:
    """Made once for a gateway."""

    def __init__(
        self, board: Board, hold_seconds: float = HOLD_SECONDS, *, providers: Providers | None = None,
        counts: Counts | None = None, bounds: Bounds = BOUNDS,
    ) -> None:  # fmt: skip
        self.board, self.hold_seconds, self.providers, self.counts = board, hold_seconds, providers, counts
        # Of the routes of the serve recipe, to be told to who asks for a name that is none.
        self.names: Callable[[], Sequence[str]] = tuple
        self.breakers = Breakers(bounds, self._tell_breaker)
        self._held: dict[str, Held] = {}

    async def answer(self, ask: Ask, send: Send, skip: int = 0) -> None:
        """Have it answered. `skip`: so many candidates are left out, 1 where the route's own target is full.

        Raises Refusal if nobody can.
        """
        targets = targets_of(ask.terms, self.providers.default if self.providers else "local")
        until = _now() + seconds(ask.terms.limits.timeout)
        turn = Turn(ask, send, until, targets, self._held_to(ask) if ask.terms.answer else None)
        if self.board.demand.engines:
            self._count(ask, {each.engine for each in targets if each.engine})
        for place in range(skip, len(targets)):
            try:
                await self._ask(turn, place)
                return
            except Unanswered as error:
                turn.failed[place] = error
        await self._ask_again(turn)

    def can_answer(self, route: str, terms: RouteTerms) -> bool:
        """Is there somebody to ask, or an engine that comes when it is wanted? Breakers are not asked."""
        ask = Ask("", {}, route, route, terms, False, [(b"", b"")])
        targets = targets_of(terms, self.providers.default if self.providers else "local")
        return any(self._is_there(ask, target) for target in targets)

    def _is_there(self, ask: Ask, target: Target) -> bool:
        try:
            found = self._found(ask, target)
        except Unanswered:
            return False
        if isinstance(found, Away):
            return bool(found.engine) and found.hold
        return found.engine.local or not ask.terms.local_only

    async def _ask(self, turn: Turn, place: int) -> None:
        """Ask one candidate. Raises Unanswered."""
        found = self._found(turn.ask, turn.targets[place])
        if isinstance(found, Away) and found.seconds:
            found = await self._when_there(turn, place, found)
        if isinstance(found, Away):
            if found.engine and all(each.engine != found.engine for each in turn.targets):
                self._count(turn.ask, {found.engine})
            raise self._away(turn.ask, found)
        await self._attempt(turn, place, found)

    async def _when_there(self, turn: Turn, place: int, away: Away) -> Route | Away:
        """An engine that comes when it is wanted: wait for it as long as it says."""
        turn.waited_from = turn.waited_from or _now()
        deadline = min(_now() + away.seconds, turn.until)
        found: Route | Away = away
        while isinstance(found, Away) and found.seconds and (left := deadline - _now()) > 0:
            if found.want:
                found.want()
            await self.board.change(min(left, LOOK_SECONDS))
            found = self._found(turn.ask, turn.targets[place])
        return found

    async def _ask_again(self, turn: Turn) -> None:
        """Hold on for a moment for those that may soon be there, and ask them once more. Raises Refusal."""
        began = _now()
        turn.waited_from, turn.is_second = turn.waited_from or began, True
        while waiting := [
            place for place, error in turn.failed.items() if error.again and turn.asked.get(place, 0) < ASKS
        ]:
            for place in waiting:
                try:
                    if await self._is_back(turn, place):
                        await self._ask(turn, place)
                        return
                except Unanswered as error:
                    turn.failed[place] = error
            patience = max(self.hold_seconds, *(turn.failed[place].patience for place in waiting))
            left = min(began + patience, turn.until) - _now()
            if left <= 0:
                break
            await self.board.change(min(left, LOOK_SECONDS))
        if not turn.failed:
            raise Refusal(429, f"{turn.ask.route} is full, and nobody else is to be asked", "busy", retry_after=5)
        # What the route itself leads to says more than a fallback that is not set up.
        refusal = turn.failed[min(turn.failed)].refusal
        if refusal.engine:
            refusal.retry_after = max(refusal.retry_after or 0, self.board.demand.seconds_left(refusal.engine))
            turn.ask.headers.append((b"x-ft-engine", self.board.demand.header(refusal.engine).encode()))
        raise refusal

    async def _is_back(self, turn: Turn, place: int) -> bool:
        """Is there somebody to ask: not the one that has just broken, unless it is well again? Raises Unanswered."""
        found = self._found(turn.ask, turn.targets[place])
        if isinstance(found, Away):
            raise self._away(turn.ask, found)
        breaker = self.breakers.of(found.engine)
        if breaker.hopeless and breaker.seconds_left():
            return False
        # While it is asked the routes may change, so who calls looks at them again.
        return found.engine is not turn.broken.get(place) or await found.engine.healthy(1.0)

    async def _attempt(self, turn: Turn, place: int, route: Route) -> None:
        ask, more = turn.ask, place + 1 < len(turn.targets) and not turn.is_second
        if ask.terms.local_only and not route.engine.local:
            raise _kept_here(ask)
        breaker = self.breakers.of(route.engine)
        ticket = breaker.admits()
        if ticket is None and (more or breaker.hopeless):
            raise _left_alone(ask, breaker, self.hold_seconds)
        turn.asked[place] = turn.asked.get(place, 0) + 1
        attempt = self._attempt_at(turn, place, route, more, partial(self._begun, turn, place, breaker, ticket))
        began = _now()
        try:
            broke = await self._passed(turn, attempt)
        except Unanswered as error:
            turn.broken[place] = route.engine
            _settle(breaker, ticket, None if not error.blame else False)
            if error.blame:
                self.board.note(route, _now() - began, failed=True)
            raise
        except BaseException as error:
            # A request that is refused was answered; one whose caller has gone shows nothing.
            _settle(breaker, ticket, True if isinstance(error, Refusal) else None)
            if isinstance(error, Refusal):
                self.board.note(route, _now() - began, failed=error.status >= 500)
            raise
        self.board.note(route, _now() - began, failed=broke is not None)
        if broke is not None and broke.status != TOO_LONG:
            _settle(breaker, ticket, False)

    async def _passed(self, turn: Turn, attempt: Attempt) -> Refusal | None:
        if turn.held is None:
            return await pass_on(self.board, attempt, turn.send)
        tell = partial(self.counts.repaired, turn.ask.route) if self.counts else None
        return await answer_held(turn.held, self.board, attempt, turn.send, tell)

    def _attempt_at(self, turn: Turn, place: int, route: Route, more: bool, begun: Callable[[], None]) -> Attempt:
        ask, target, now = turn.ask, turn.targets[place], _now()
        headers = [*ask.headers, (b"x-ft-adapter", label_of(target, route.adapter))]
        if place:
            headers.append((b"x-ft-fallback", b"%d" % place))
        if turn.waited_from:
            headers.append((b"x-ft-held", b"%.1f" % (now - turn.waited_from)))
        # A whole answer begins when it is ready: it is hurried only where somebody else could give it.
        hurried = more or ask.request.get("stream")
        first = min(now + seconds(ask.terms.limits.first_token), turn.until) if hurried else turn.until
        request = for_openai(ask.path, ask.request) if target.openai else ask.request
        return Attempt(route, ask.path, request, headers, first, turn.until, begun)

    def _begun(self, turn: Turn, place: int, breaker: Breaker, ticket: Ticket | None) -> None:
        _settle(breaker, ticket, True)
        if place and self.counts:
            self.counts.fell_back(turn.ask.route, turn.targets[place].name)

    def _found(self, ask: Ask, target: Target) -> Route | Away:
        """Where a candidate leads now. Raises Unanswered for what leads nowhere."""
        if target.openai:
            return self.providers.openai(target.openai) if self.providers else Away("it is not set up", hold=False)
        if target.engine and not target.model:
            return self._engines_own(target.engine, target.as_)
        return self._champion(ask, target.model or ask.name, target.engine)

    def _engines_own(self, engine: str, as_: str | None) -> Route | Away:
        found = self.board.routes.engines.get(engine, Away("its engine has not come up yet"))
        return replace(found, adapter=as_) if as_ and isinstance(found, Route) else found

    def _champion(self, ask: Ask, name: str, engine: str | None) -> Route | Away:
        """On that engine, where it puts up a part of its own."""
        routes = self.board.part(engine) if engine else self.board.routes
        found = routes.find(name, internal=ask.internal) if engine else None
        if found is None:
            routes = self.board.routes
            found = routes.find(name, internal=ask.internal)
        if found is None:
            raise Unanswered(self._unknown(name, ask), blame=False)
        if isinstance(found, Route) and (split := routes.splits.get(name)):
            found = split.pick(ask.subject(split.by))
        if ask.terms.local_only and isinstance(found, Route) and not found.engine.local:
            # An endpoint in the cloud answers while ours is away; not for this route.
            found = self.board.find_local(name, internal=ask.internal)
            if found is None:
                raise _kept_here(ask)
        return found

    def _unknown(self, name: str, ask: Ask) -> Refusal:
        routes = self.board.routes
        if name in routes.closed:
            return Refusal(404, f"{name} is not served: {routes.closed[name]}", "model_not_served", param="model")
        if name in routes.internal:
            return Refusal(404, f"{name} needs the internal key", "model_not_public", param="model")
        if ask.route in self.names() and "@" not in name:
            return Refusal(404, f"{ask.route} leads to the model {name[:100]}, and no version of it answers yet",
                           "model_not_served", param="model")  # fmt: skip
        return routes.unknown(name, self.names(), ask.may)

    def _held_to(self, ask: Ask) -> Held | None:
        """Compiled once for a route, and again when the recipe has changed."""
        terms = ask.terms.answer
        if terms is None or ask.path not in HELD_PATHS:
            return None
        held = self._held.get(ask.route)
        if held is None or held.terms is not terms:
            held = self._held[ask.route] = Held(ask.route, terms)
        return held

    def _away(self, ask: Ask, away: Away) -> Unanswered:
        """Whoever finds it away wants it, also where somebody else answers this time."""
        if away.want:
            away.want()
        refusal = Refusal(503, f"{ask.name} is away: {away.reason}", "engine_away", retry_after=away.retry_after)
        refusal.engine = away.engine
        return Unanswered(refusal, again=away.hold, blame=False, patience=away.patience)

    def _count(self, ask: Ask, engines: set[str]) -> None:
        """For engines that start by themselves when enough requests came that could go there."""
        for engine in engines:
            terms = self.board.demand.engines.get(engine)
            if terms is not None and terms.volume is not None:
                self.board.demand.count(engine, last_message(ask.request))

    def _tell_breaker(self, upstream: Upstream, state: State) -> None:
        name = next((name for name, route in self.board.routes.engines.items()
                     if isinstance(route, Route) and route.engine is upstream), "")  # fmt: skip
        if self.counts:
            self.counts.breaker(name or getattr(upstream, "name", "engine"), state)


def _settle(breaker: Breaker, ticket: Ticket | None, worked: bool | None) -> None:
    if ticket is not None:
        (breaker.spared if worked is None else breaker.worked if worked else breaker.failed)(ticket)


def _left_alone(ask: Ask, breaker: Breaker, hold_seconds: float) -> Unanswered:
    left = breaker.seconds_left()
    wait = max(math.ceil(left), 1)
    refusal = Refusal(503, f"{ask.name} is left alone for a while: its engine failed again and again", "engine_away",
                      retry_after=wait)  # fmt: skip
    return Unanswered(refusal, again=left <= hold_seconds, blame=False)


def _kept_here(ask: Ask) -> Unanswered:
    refusal = Refusal(503, f"{ask.name} is answered by machines of ours alone, and none of them can just now",
                      "local_only", retry_after=30)  # fmt: skip
    return Unanswered(refusal, blame=False)


def _now() -> float:
    return asyncio.get_running_loop().time()

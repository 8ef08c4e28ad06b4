"""Circuit breakers: an upstream that fails again and again is left alone for a while, then tried with one request.

closed -> open when at least so large a part of its last answers failed; open -> half-open after a cool-down that grows
with each failed trial; half-open lets one request through, whose end decides. No clock of its own, no I/O.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal
from weakref import WeakKeyDictionary, ref

from serving.routes import Upstream

State = Literal["closed", "half-open", "open"]
Said = Callable[[Upstream, State], None]
# What a request holds that was let through: of which period of the breaker it is.
Ticket = int


@dataclass(frozen=True)
class Bounds:
    """`ratio` of the answers of the last `window` seconds (at most `samples` of them, at least `least`) failed: open.
    `cool_down` seconds, doubled with each trial that fails up to `longest`, give or take `jitter` of it."""

    ratio: float = 0.5
    least: int = 5
    samples: int = 100
    window: float = 30.0
    cool_down: float = 5.0
    longest: float = 60.0
    jitter: float = 0.2


BOUNDS = Bounds()


class Breaker:
    """Of one upstream. Each request that `admits` lets through ends in one of `worked`, `failed` and `spared`."""

    def __init__(
        self,
        bounds: Bounds = BOUNDS,
        clock: Callable[[], float] = time.monotonic,
        dice: Callable[[], float] = random.random,
        said: Callable[[State], None] = lambda _: None,
    ) -> None:
        """`dice` gives numbers of [0, 1); `said` is called with each new state."""
        self.state: State = "closed"
        # Had all failed when it opened? Else there is still something to be had from this upstream.
        self.hopeless = False
        self._bounds, self._clock, self._dice, self._said = bounds, clock, dice, said
        self._ends: deque[tuple[float, bool]] = deque(maxlen=bounds.samples)
        self._period, self._trials, self._until, self._probing = 0, 0, 0.0, False

    def admits(self) -> Ticket | None:
        """None: not now."""
        if self.state == "closed":
            return self._period
        if self.state == "open" and self._clock() >= self._until:
            self._becomes("half-open")
        if self.state == "open" or self._probing:
            return None
        self._probing = True
        return self._period

    def worked(self, ticket: Ticket) -> None:
        """It has answered, or begun to."""
        self._ended(ticket, failed=False)

    def failed(self, ticket: Ticket) -> None:
        """It gave no answer, or half of one."""
        self._ended(ticket, failed=True)

    def spared(self, ticket: Ticket) -> None:
        """It was not decided: the caller went away, or the upstream was only busy."""
        if ticket == self._period:
            self._probing = False

    def seconds_left(self) -> float:
        """Until it lets somebody through."""
        return max(self._until - self._clock(), 0.0) if self.state == "open" else 0.0

    def _ended(self, ticket: Ticket, *, failed: bool) -> None:
        if ticket != self._period:
            return  # of a time before the last change of state, which it has no more to say about
        if self.state == "half-open":
            self._opens(hopeless=True) if failed else self._closes()
            return
        now = self._clock()
        self._ends.append((now, failed))
        if failed:
            self._judge(now)

    def _judge(self, now: float) -> None:
        while now - self._ends[0][0] > self._bounds.window:
            self._ends.popleft()
        failures = sum(failed for _, failed in self._ends)
        if len(self._ends) >= self._bounds.least and failures >= self._bounds.ratio * len(self._ends):
            self._opens(hopeless=failures == len(self._ends))

    def _opens(self, *, hopeless: bool) -> None:
        longest = min(self._bounds.cool_down * 2**self._trials, self._bounds.longest)
        spread = 1 + self._bounds.jitter * (2 * self._dice() - 1)
        self._until, self.hopeless = self._clock() + longest * spread, hopeless
        self._trials = min(self._trials + 1, 30)
        self._becomes("open")

    def _closes(self) -> None:
        self._trials, self.hopeless = 0, False
        self._becomes("closed")

    def _becomes(self, state: State) -> None:
        self.state, self._probing = state, False
        self._period += 1
        self._ends.clear()
        self._said(state)


class Breakers:
    """One for each upstream, as long as it lives: a restarted engine is another upstream, and starts afresh."""

    def __init__(self, bounds: Bounds = BOUNDS, said: Said = lambda _, __: None) -> None:
        self._bounds, self._said = bounds, said
        self._all: WeakKeyDictionary[Upstream, Breaker] = WeakKeyDictionary()

    def of(self, upstream: Upstream) -> Breaker:
        found = self._all.get(upstream)
        if found is None:
            # Weakly: what a breaker holds on to would keep its own key alive.
            found = self._all[upstream] = Breaker(self._bounds, said=partial(self._tell, ref(upstream)))
        return found

    def _tell(self, upstream: ref[Upstream], state: State) -> None:
        if (there := upstream()) is not None:
            self._said(there, state)

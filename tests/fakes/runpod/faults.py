"""The fault script: what goes wrong, how often, and when. The same seed and order give the same faults."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from pydantic import Field

from tests.fakes.runpod.contract import Closed, Problem, checked

# Of one request. Without `_after` nothing is done; with it, it is done, and the answer is lost.
REQUEST = (
    "rate_limit",
    "error",
    "timeout",
    "reset",
    "ignore",
    "error_after",
    "timeout_after",
    "reset_after",
    "garbage",
)
# Of a pod that is being made: two of it, none of it, dearer than the catalogue says, or one that fares badly.
POD = ("duplicate", "no_capacity", "price", "dies", "hangs", "restarts", "stuck", "breaks", "idle")
# Of everything, as long as the rule is there: `seconds` each, sold_out by `gpu`.
STANDING = ("list_lag", "clock_skew", "billing_lag", "sold_out")
AT_RANDOM = ("rate_limit", "error", "timeout_after", "error_after", "reset_after", "reset", "duplicate", "no_capacity")

FaultName = Literal[
    "rate_limit", "error", "timeout", "reset", "ignore", "error_after", "timeout_after", "reset_after", "garbage",
    "duplicate", "no_capacity", "price", "dies", "hangs", "restarts", "stuck", "breaks", "idle",
    "list_lag", "clock_skew", "billing_lag", "sold_out", "random",
]  # fmt: skip


class Rule(Closed):
    """`match` is `METHOD /path` with * and ?; `gpu` likewise of the ordered type. `times` None: always. `after`: how
    many matching requests are spared first. `seconds`: of a wait, a life, a lag, Retry-After; `factor` of a price."""

    fault: FaultName
    match: str = "*"
    gpu: str = "*"
    times: int | None = None
    after: int = 0
    probability: float = Field(1.0, ge=0, le=1)
    seconds: float = 1.0
    status: int = 500
    factor: float = 2.0
    detail: str = ""


@dataclass(frozen=True)
class Fault:
    name: str
    rule: Rule


@dataclass
class _Counted:
    rule: Rule
    seen: int = 0
    fired: int = 0


@dataclass
class Faults:
    seed: int = 0
    _rules: list[_Counted] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def replace(self, rules: Any) -> None:
        """Instead of all that were there. Raises Problem 422."""
        if not isinstance(rules, list):
            raise Problem(422, "faults are a list of rules")
        read = [_Counted(checked(Rule, each)) for each in rules]
        with self._lock:
            self._rules = read

    def add(self, rules: Any) -> None:
        if not isinstance(rules, list):
            raise Problem(422, "faults are a list of rules")
        read = [_Counted(checked(Rule, each)) for each in rules]
        with self._lock:
            self._rules += read

    def shown(self) -> list[dict[str, Any]]:
        with self._lock:
            return [each.rule.model_dump() | {"seen": each.seen, "fired": each.fired} for each in self._rules]

    def of(self, method: str, path: str, gpu: str) -> list[Fault]:
        """What befalls this request: at most one of REQUEST, and any of POD."""
        found: list[Fault] = []
        with self._lock:
            for each in self._rules:
                if each.rule.fault not in STANDING and _matches(each.rule, method, path, gpu) and self._fires(each):
                    name = self._chosen(method, path) if each.rule.fault == "random" else each.rule.fault
                    if name in POD or not any(fault.name in REQUEST for fault in found):
                        each.fired += 1
                        found.append(Fault(name, each.rule))
        return found

    def seconds(self, name: str) -> float:
        """Of a standing fault; 0 without one."""
        with self._lock:
            return max((each.rule.seconds for each in self._rules if each.rule.fault == name), default=0.0)

    def sold_out(self, gpu: str) -> bool:
        with self._lock:
            return any(each.rule.fault == "sold_out" and fnmatchcase(gpu, each.rule.gpu) for each in self._rules)

    def _fires(self, each: _Counted) -> bool:
        each.seen += 1
        if each.seen <= each.rule.after or (each.rule.times is not None and each.fired >= each.rule.times):
            return False
        return self._random.random() < each.rule.probability

    def _chosen(self, method: str, path: str) -> str:
        making = (method, path) == ("POST", "/v2/pods")
        return self._random.choice([each for each in AT_RANDOM if making or each not in POD])


def _matches(rule: Rule, method: str, path: str, gpu: str) -> bool:
    return fnmatchcase(f"{method} {path}", rule.match) and fnmatchcase(gpu, rule.gpu)

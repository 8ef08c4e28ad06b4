"""A cloud in memory that does what RunPod may do: lose answers, show pods late, make two, refuse, ask other prices.

It keeps the truth: which pods live, and what each has cost to the cent (`pass_time`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from registry.runpod_shapes import Pod, PodOrder


@dataclass
class ScriptedCloud:
    """`faults` holds, by verb, what the next calls do: an exception to raise, 'lost' (done, answer lost),
    'twice' (two pods are made), or a price. `before` is called at the start of every call, and may raise.
    """

    price: float = 0.5
    lag: float = 0.0
    linger: float = 0.0
    faults: dict[str, list[object]] = field(default_factory=dict)
    before: Callable[[str], None] = lambda _: None
    living: dict[str, Pod] = field(default_factory=dict)
    gone: dict[str, Pod] = field(default_factory=dict)
    bill: dict[str, float] = field(default_factory=dict)
    endpoint_bill: dict[str, float] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    orders: list[PodOrder] = field(default_factory=list)
    _since: dict[str, float] = field(default_factory=dict)
    _made: int = 0

    def pods(self) -> list[Pod]:
        """A pod is shown only `lag` seconds after it was made, and for `linger` seconds after its end."""
        self._begin("pods")
        now = time.monotonic()
        gone = [
            replace(each, status="RUNNING") for each in self.gone.values() if now - self._since[each.id] < self.linger
        ]
        return [each for each in self.living.values() if now - self._since[each.id] >= self.lag] + gone

    def pod(self, id: str) -> Pod | None:
        self._begin("pod")
        return self.living.get(id)

    def create(self, order: PodOrder) -> Pod:
        fault = self._begin("create", order.gpu)
        self.orders.append(order)
        price = float(fault) if isinstance(fault, float) else self.price
        made = [self.start(order.name, price, order.gpu) for _ in range(2 if fault == "twice" else 1)]
        if isinstance(fault, tuple):
            raise fault[1]
        return made[0]

    def terminate(self, id: str) -> None:
        self._begin("terminate", id)
        self.end(id)

    def billing(self, since: float | None = None, pod: str | None = None) -> dict[str, float]:
        self._begin("billing")
        return {id_: usd for id_, usd in self.bill.items() if pod in (None, id_)}

    def endpoint_billing(self, since: float | None = None, endpoint: str | None = None) -> dict[str, float]:
        self._begin("endpoint_billing")
        return dict(self.endpoint_bill)

    def start(self, name: str, price: float = 0.5, gpu: str = "NVIDIA A40", created: float | None = None) -> Pod:
        """A pod comes to be, whoever wanted it."""
        self._made += 1
        pod = Pod(f"pod{self._made}", name, "RUNNING", gpu, "secure", price, created, 1.0, 50.0)
        self.living[pod.id], self.bill[pod.id], self._since[pod.id] = pod, 0.0, time.monotonic()
        return pod

    def end(self, id: str) -> None:
        if pod := self.living.pop(id, None):
            self.gone[id], self._since[id] = replace(pod, status="TERMINATED"), time.monotonic()

    def pass_time(self, seconds: float) -> None:
        for pod in self.living.values():
            self.bill[pod.id] += seconds * pod.usd_per_hour / 3600

    def _begin(self, verb: str, of: str = "") -> object:
        """A tuple ('lost', error) is done first and raised afterwards; an exception is raised before anything."""
        self.calls.append(f"{verb} {of}".strip())
        self.before(verb)
        fault = next(iter(self.faults.get(verb, [])), None)
        if fault is not None:
            self.faults[verb].pop(0)
        if isinstance(fault, BaseException):
            raise fault
        return fault

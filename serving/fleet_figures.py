"""What engines do, counted for Prometheus: up or not, starts on demand, swaps with the seconds of their parts."""

from __future__ import annotations

from collections.abc import Mapping

from serving.metrics import Metrics
from serving.server_record import EngineStatus


class FleetFigures:
    """`look` is given how all engines stand, again and again; each swap, start and refusal counts once."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._starts: dict[str, int] = {}
        self._failed: dict[str, int] = {}
        self._swapped: dict[str, float] = {}
        self._refused: set[tuple[str, str]] = set()

    def look(self, engines: Mapping[str, EngineStatus]) -> None:
        for name, engine in engines.items():
            self._metrics.engine_up(name, engine.state == "serving")
            self._count_start(name, engine)
            self._count_swaps(name, engine)
        refused = {(name, version) for name, engine in engines.items() for version in engine.refused}
        for _, version in refused - self._refused:
            self._metrics.refused(version.partition("@")[0])
        self._refused = refused

    def _count_start(self, name: str, engine: EngineStatus) -> None:
        """When it is up, since only then it is known how long it took."""
        if engine.start == "demand" and engine.state == "serving" and engine.starts > self._starts.get(name, 0):
            self._starts[name] = engine.starts
            self._metrics.started(name, engine.start_seconds or 0.0)
        if engine.start == "demand":
            for _ in range(engine.failed_starts - self._failed.get(name, 0)):
                self._metrics.started(name, 0.0, ok=False)
            self._failed[name] = engine.failed_starts

    def _count_swaps(self, name: str, engine: EngineStatus) -> None:
        last = self._swapped.get(name, 0.0)
        for swap in [each for each in engine.swaps if each["at"] > last]:
            self._metrics.swapped(swap["route"], swap["seconds"])
            self._swapped[name] = swap["at"]

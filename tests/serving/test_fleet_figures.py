"""Engines in Prometheus' figures: what is looked at again and again is counted once."""

from __future__ import annotations

from dataclasses import replace

from serving.fleet_figures import FleetFigures
from serving.metrics import Metrics
from serving.server_record import EngineStatus

OFF = EngineStatus("main", "off", "", {}, {}, "cpu", 8, start="demand")
SWAP = {"version": "tickets@2", "route": "tickets", "at": 5.0, "seconds": {"load": 0.2, "flip": 0.00002}}


def test_starts_swaps_and_refusals_count_once() -> None:
    metrics = Metrics(["tickets"])
    figures = FleetFigures(metrics)
    up = replace(
        OFF, state="serving", starts=1, start_seconds=12.0, swaps=[SWAP], refused={"tickets@3": "another base"}
    )
    for status in (OFF, up, up, up):
        figures.look({"main": status})
    figures.look({"main": replace(up, starts=2, start_seconds=9.0, swaps=[SWAP, {**SWAP, "at": 6.0}])})
    lines = metrics.text().decode().splitlines()
    for expected in (
        'ft_engine_up{engine="main"} 1.0', 'ft_on_demand_starts_total{engine="main",outcome="ok"} 2.0',
        'ft_swaps_total{outcome="served",route="tickets"} 2.0', 'ft_swaps_total{outcome="refused",route="tickets"} 1.0',
        'ft_swap_seconds_count{part="load",route="tickets"} 2.0',
        'ft_on_demand_start_seconds_sum{engine="main"} 21.0',
    ):  # fmt: skip
        assert expected in lines, expected
    assert 'outcome="failed"' not in metrics.text().decode()
    for _ in range(2):
        figures.look({"main": replace(OFF, failed_starts=2)})
    assert 'ft_on_demand_starts_total{engine="main",outcome="failed"} 2.0' in metrics.text().decode()
    figures.look({"main": replace(up, state="engine restarting")})
    assert 'ft_engine_up{engine="main"} 0.0' in metrics.text().decode()

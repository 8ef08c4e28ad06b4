"""The objectives of routes as a rules file for Prometheus: `ft serve rules` prints it. Pure.

They say of Prometheus' own data what serving/objectives.py says of one gateway's: with several gateways, of all of them
together, and also when no gateway is there to say anything.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from registry.objectives import Objectives

GATEWAY_GONE = {
    "alert": "FtGatewayGone",
    "expr": "absent(ft_gateway_started_seconds)",
    "for": "1m",
    "labels": {"severity": "critical"},
    "annotations": {"summary": "no gateway of ft is scraped: it is down, or Prometheus cannot reach it"},
}


def alert_rules(routes: Mapping[str, Objectives]) -> dict[str, Any]:
    """The content of a rules file: one group for each route, and one for what holds without any objective."""
    groups = [{"name": "ft", "rules": [GATEWAY_GONE]}]
    groups += [{"name": f"ft {route}", "rules": _rules(route, each)} for route, each in sorted(routes.items())]
    return {"groups": groups}


def as_yaml(rules: Mapping[str, Any]) -> str:
    return yaml.safe_dump(rules, sort_keys=False, allow_unicode=True, width=1000)


def _rules(route: str, objectives: Objectives) -> list[dict[str, Any]]:
    # A caller's names are not in it, but a recipe may call a route what it likes.
    of = f"route={json.dumps(route, ensure_ascii=False)}"
    return [ALERTS[name](route, of, limit, objectives) for name, limit in objectives.limits.items()]


def _p95(route: str, of: str, limit: float, objectives: Objectives) -> dict[str, Any]:
    window = objectives.window
    seconds = f"histogram_quantile(0.95, sum by (le) (rate(ft_request_seconds_bucket{{{of}}}[{window}])))"
    answers = f"sum(increase(ft_request_seconds_count{{{of}}}[{window}]))"
    return _alert(
        "FtSlow", route, f"{seconds} > {limit!r} and {answers} >= {objectives.requests}",
        f"p95 is {{{{ $value | humanizeDuration }}}}, promised {limit:g} s",
    )  # fmt: skip


def _error_rate(route: str, of: str, limit: float, objectives: Objectives) -> dict[str, Any]:
    window = objectives.window
    errors = f'sum(increase(ft_requests_total{{{of},status="5xx"}}[{window}]))'
    all_ = f'sum(increase(ft_requests_total{{{of},status=~"2xx|5xx"}}[{window}]))'
    return _alert(
        "FtErrors", route, f"{errors} / {all_} > {limit!r} and {all_} >= {objectives.requests}",
        f"{{{{ $value | humanizePercentage }}}} of the requests end in an error, promised {100 * limit:g}%",
    )  # fmt: skip


def _availability(route: str, of: str, limit: float, objectives: Objectives) -> dict[str, Any]:
    # A route that one of several gateways can answer is there.
    up = f"max(avg_over_time(ft_route_up{{{of}}}[{objectives.window}]))"
    return _alert(
        "FtAway", route, f"{up} < {limit!r}",
        f"something could answer in {{{{ $value | humanizePercentage }}}} of the time, promised {100 * limit:g}%",
    )  # fmt: skip


def _concurrent(route: str, of: str, limit: float, objectives: Objectives) -> dict[str, Any]:
    return _alert(
        "FtCrowded", route, f"sum(ft_requests_under_way{{{of}}}) > {limit!r}",
        f"{{{{ $value }}}} requests are under way at once, promised for {limit:g}",
    )  # fmt: skip


ALERTS: Mapping[str, Callable[[str, str, float, Objectives], dict[str, Any]]] = {
    "p95": _p95, "error_rate": _error_rate, "availability": _availability, "concurrent": _concurrent,
}  # fmt: skip


def _alert(name: str, route: str, expr: str, says: str) -> dict[str, Any]:
    """Without `for`: the window is the patience already."""
    return {
        "alert": name,
        "expr": expr,
        "labels": {"severity": "warning", "route": _plain(route)},
        "annotations": {"summary": f"{_plain(route)}: {says}"},
    }


def _plain(route: str) -> str:
    """Prometheus reads annotations and labels as templates."""
    return route.replace("{{", "{ {")

"""Rules, dashboard and exposition before promtool and a real Prometheus: what it cannot read no operator can either."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from registry.objectives import Objectives
from serving.alert_rules import alert_rules, as_yaml
from serving.http_messages import Receive, Refusal, Scope, Send, header, send_refusal
from serving.metrics import CONTENT_TYPE, Metrics
from serving.metrics_page import answer_metrics
from serving.objectives import Judge
from tests.conftest import ROOT
from tests.fakes.uvicorn_thread import uvicorn_thread
from tests.prometheus_server import NotToBeHad, Prometheus, Tools, prometheus_server, prometheus_tools

DASHBOARD = ROOT / "docs" / "grafana" / "ft-serving.json"
MANUAL = ROOT / "docs" / "monitoring.md"
TERMS = Objectives(p95="2s", error_rate=0.01, availability=0.99, concurrent=8, window="5m", requests=20)
ROUTES = {"tickets": TERMS, "notes": Objectives(p95="800ms")}
OURS = re.compile(r"\bft_[a-z0-9_]+")
SUFFIXES = ("_total", "_bucket", "_sum", "_count")


@pytest.fixture(scope="session")
def tools(persons_cache: Path) -> Tools:
    try:
        return prometheus_tools(persons_cache)
    except NotToBeHad as error:
        pytest.skip(f"{error}; install Prometheus, or run this where Debian's packages can be reached")


def well_used() -> Metrics:
    """With every figure it has."""
    metrics = Metrics(["tickets", "notes"], ["shop"], [2.0, 0.8], Judge(ROUTES, time.monotonic()))
    began = metrics.begin("tickets", "shop")
    began.first()
    began.done(200, "tickets@3", 60, {"prompt_tokens": 40, "completion_tokens": 60})
    metrics.begin('a "route"\n\\', "").done(503, code="engine_away")
    with metrics.queued("tickets"):
        metrics.swapped("tickets", {"load": 1.0, "flip": 0.00001})
    metrics.refused("tickets")
    metrics.started("big", 3.0)
    metrics.engine_up("big", True)
    metrics.fell_back("tickets", "openai")
    metrics.breaker("openai", "half-open")
    metrics.repaired("tickets", ok=False)
    metrics.rated("tickets@3", 1)
    metrics.answering({"tickets": True, "notes": False})
    metrics.serves({"tickets": "tickets@3"})
    assert metrics.judge
    metrics.stand(metrics.judge.standings(time.monotonic()))
    return metrics


def names_of(metrics: Metrics) -> set[str]:
    """As the exposition calls them, without the suffixes of samples."""
    return set(re.findall(r"^# TYPE (\S+)", metrics.text().decode(), re.MULTILINE))


def family(name: str, known: set[str]) -> str:
    """The family that a sample's name belongs to."""
    cut = next((name.removesuffix(each) for each in SUFFIXES[1:] if name.endswith(each)), name)
    return cut if cut in known else name


def test_promtool_has_nothing_against_the_exposition(tools: Tools) -> None:
    assert tools.check_metrics(well_used().text()) == ""


def test_promtool_has_nothing_against_the_rules(tools: Tools, tmp_path: Path) -> None:
    odd = {'say "hi" \\ {{ $x }} 한글': TERMS, "cheap": Objectives(error_rate=0.00001, availability=1)}
    path = tmp_path / "rules.yaml"
    path.write_text(as_yaml(alert_rules({**ROUTES, **odd})), encoding="utf-8")
    assert "12 rules found" in tools.check("check", "rules", path)


def test_rules_without_routes_still_say_when_no_gateway_is_there(tools: Tools, tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(as_yaml(alert_rules({})), encoding="utf-8")
    assert "1 rules found" in tools.check("check", "rules", path)


def series(name: str, values: str, **labels: str) -> dict[str, str]:
    shown = ",".join(f'{key}="{value}"' for key, value in labels.items())
    return {"series": f"{name}{{{shown}}}", "values": values}


def requests(status: str, values: str) -> dict[str, str]:
    return series("ft_requests_total", values, route="tickets", adapter="tickets@3", key="shop", status=status)


def histogram(within: str, all_: str) -> list[dict[str, str]]:
    of = {"route": "tickets", "adapter": "tickets@3", "key": "shop"}
    name = "ft_request_seconds"
    return [series(f"{name}_bucket", within, **of, le="2.0"), series(f"{name}_bucket", all_, **of, le="3.0"),
            series(f"{name}_bucket", all_, **of, le="+Inf"), series(f"{name}_count", all_, **of)]  # fmt: skip


def up(values: str) -> dict[str, str]:
    return series("ft_route_up", values, route="tickets")


HERE = series("ft_gateway_started_seconds", "1+0x20", instance="a")
CASES: dict[str, tuple[list[dict[str, str]], str, bool]] = {
    "4 of 100 are slow": ([HERE, *histogram("0+96x20", "0+100x20")], "FtSlow", False),
    "6 of 100 are slow": ([HERE, *histogram("0+94x20", "0+100x20")], "FtSlow", True),
    "half is slow, of ten": ([HERE, *histogram("0+1x20", "0+2x20")], "FtSlow", False),
    "half is slow, of twenty-five": ([HERE, *histogram("0+2x20", "0+5x20")], "FtSlow", True),
    "a hundredth fails": ([HERE, requests("2xx", "0+99x20"), requests("5xx", "0+1x20")], "FtErrors", False),
    "two hundredths fail": ([HERE, requests("2xx", "0+98x20"), requests("5xx", "0+2x20")], "FtErrors", True),
    "all of ten fail": ([HERE, requests("2xx", "0+0x20"), requests("5xx", "0+2x20")], "FtErrors", False),
    "callers are wrong": (
        [HERE, requests("2xx", "0+9x20"), requests("5xx", "0+0x20"), requests("4xx", "0+90x20")], "FtErrors", False
    ),
    "always there": ([HERE, up("1+0x20")], "FtAway", False),
    "away for a minute of five": ([HERE, up("1+0x8 0 1+0x11")], "FtAway", True),
    "one gateway of two is away": (
        [HERE, up("0+0x20"), series("ft_route_up", "1+0x20", route="tickets", instance="b")], "FtAway", False
    ),
    "eight at once": (
        [HERE, series("ft_requests_under_way", "8+0x20", route="tickets", key="shop")], "FtCrowded", False
    ),
    "nine at once": (
        [HERE, *(series("ft_requests_under_way", f"{n}+0x20", route="tickets", key=f"k{n}") for n in (4, 5))],
        "FtCrowded", True,
    ),
    "a gateway": ([HERE], "FtGatewayGone", False),
    "no gateway": ([up("1+0x20")], "FtGatewayGone", True),
}  # fmt: skip


def test_rules_fire_when_they_should_and_only_then(tools: Tools, tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(as_yaml(alert_rules({"tickets": TERMS})), encoding="utf-8")
    tests = [rule_test(name, *case) for name, case in CASES.items()]
    content = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": tests}
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    tools.check("test", "rules", "tests.yaml", folder=tmp_path)


def rule_test(name: str, given: list[dict[str, str]], alert: str, fires: bool) -> dict[str, Any]:
    """Asked by the alerts' own series, so that what a message says is free."""
    expr = f'count(ALERTS{{alertname="{alert}",alertstate="firing"}})'
    wanted = [{"labels": "{}", "value": 1}] if fires else []
    return {"interval": "1m", "name": name, "input_series": given,
            "promql_expr_test": [{"expr": expr, "eval_time": "10m", "exp_samples": wanted}]}  # fmt: skip


def expressions() -> Iterator[str]:
    """Of the dashboard, with Grafana's variables filled in."""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel["targets"]:
            yield re.sub(r"\$(route|adapter|key)\b", ".*", target["expr"].replace("$__rate_interval", "5m"))


def test_promtool_reads_every_expression_of_the_dashboard(tools: Tools, tmp_path: Path) -> None:
    rules = [{"record": f"panel:{n}", "expr": each} for n, each in enumerate(expressions())]
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}), encoding="utf-8")
    assert f"{len(rules)} rules found" in tools.check("check", "rules", path)


def test_dashboard_rules_and_manual_name_only_what_there_is() -> None:
    known = names_of(well_used())
    for where in (*expressions(), as_yaml(alert_rules(ROUTES)), MANUAL.read_text()):
        assert {family(each, known) for each in OURS.findall(where)} <= known


def test_dashboard_and_manual_leave_no_figure_out() -> None:
    known = {each for each in names_of(well_used()) if each.startswith("ft_")}
    shown = {family(each, known) for one in expressions() for each in OURS.findall(one)}
    assert known - shown == set()
    assert known - {family(each, known) for each in OURS.findall(MANUAL.read_text())} == set()


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    found = json.loads(DASHBOARD.read_text())
    panels = found["panels"]
    assert found["schemaVersion"] >= 39
    assert "id" not in found  # a dashboard's own is given by the Grafana that imports it
    assert len({each["id"] for each in panels}) == len(panels)
    for each in panels:
        place = each["gridPos"]
        assert place["x"] + place["w"] <= 24
        assert each["datasource"]["uid"] == "${datasource}"
        assert all(target["legendFormat"] for target in each["targets"])
    places = {(each["gridPos"]["x"], each["gridPos"]["y"]) for each in panels}
    assert len(places) == len(panels)
    variables = {each["name"] for each in found["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z]+)", json.dumps(panels)))
    assert used == variables


@contextmanager
def exposed(metrics: Metrics) -> Iterator[str]:
    """host:port of a server that answers as the gateway does; `bearer internal` is its internal key."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        internal = header(scope, b"authorization") == b"Bearer internal"
        try:
            await answer_metrics(metrics, scope, send, [(b"x-request-id", b"1")], internal=internal)
        except Refusal as refusal:
            await send_refusal(send, refusal, [])

    with uvicorn_thread(app) as url:
        yield url.removeprefix("http://")


@pytest.mark.parametrize(
    ("sent", "status"),
    [({}, 200), ({"X-Forwarded-For": "203.0.113.9"}, 403), ({"Via": "1.1 proxy"}, 403),
     ({"X-Forwarded-For": "203.0.113.9", "Authorization": "Bearer internal"}, 200),
     ({"X-Real-IP": "127.0.0.1", "Authorization": "Bearer wrong"}, 403)],
)  # fmt: skip
def test_the_page_is_for_this_machine_or_who_has_the_key(sent: dict[str, str], status: int) -> None:
    metrics = well_used()
    with exposed(metrics) as target:
        request = urllib.request.Request(f"http://{target}/metrics", headers=sent)
        try:
            answer = urllib.request.urlopen(request, timeout=10)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            body = answer.read()
        assert answer.status == status
        assert (b"ft_requests_total" in body) == (status == 200)
        if status == 200:
            assert answer.headers["content-type"] == CONTENT_TYPE


def test_who_comes_from_elsewhere_or_nowhere_is_not_here() -> None:
    for client in (None, ("203.0.113.9", 5), ("::ffff:203.0.113.9", 5), ("", 0)):
        scope: Scope = {"type": "http", "headers": [], "client": client}
        with pytest.raises(Refusal):
            asyncio.run(answer_metrics(Metrics(), scope, _nowhere, [], internal=False))


async def _nowhere(_: Any) -> None:
    raise AssertionError("nothing is to be sent")


def until(happened: Any, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it has not happened in time"
        time.sleep(0.2)


def test_a_real_prometheus_scrapes_it_and_its_alerts_fire_and_end(tools: Tools) -> None:
    terms = Objectives(error_rate=0.1, concurrent=2, window="30s", requests=10)
    metrics, over = well_used(), threading.Event()
    with exposed(metrics) as target:
        rules = as_yaml(alert_rules({"tickets": terms}))
        with prometheus_server(tools, {"ft": target}, rules) as server:
            until(lambda: server.value('up{job="ft"}') == 1)
            every_figure_arrives(server, metrics)
            assert server.firing() == set()
            under_way = [metrics.begin("tickets", "shop") for _ in range(3)]
            asking = threading.Thread(target=fail_on, args=(metrics, over))
            asking.start()
            try:
                until(lambda: server.firing() == {("FtErrors", "tickets"), ("FtCrowded", "tickets")})
            finally:
                over.set()
                asking.join(10)
            for each in under_way:
                each.done(200, "tickets@3")
            until(lambda: server.firing() == {("FtErrors", "tickets")})


def every_figure_arrives(server: Prometheus, metrics: Metrics) -> None:
    wanted = {each for each in names_of(metrics) if each.startswith("ft_")}
    stored = {family(each, wanted) for each in server.api("label/__name__/values")}
    assert wanted <= stored
    assert server.value('ft_request_seconds_bucket{route="tickets",le="2.0"}') == 1
    assert server.value('ft_breaker_state{upstream="openai"}') == 1


def fail_on(metrics: Metrics, over: threading.Event) -> None:
    """Half of the requests fail, for at most half a minute."""
    for n in range(600):
        metrics.begin("tickets", "shop").done(503 if n % 2 else 200, "tickets@3", code="engine_away" if n % 2 else "")
        if over.wait(0.05):
            return

"""`ft cost`: the ledger is RunPod's bill to the cent, and what is not final yet is marked."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from jobs.pod_reaper import Reaper
from registry import ledger
from registry.budgets import RentedPod
from registry.charges import Payer, reserved
from registry.cloud_terms import Budgets
from registry.costs import NOT_KNOWN, forecast, lines
from registry.ledger import Intent
from registry.project import Project
from registry.rentals import pod_name, rented_pods
from registry.runpod_api import RunPod
from registry.store import Store
from tests.cli.test_endpoints import DEPLOY, made, promote
from tests.cli.test_pods import a_pod, a_rental, ft
from tests.fakes.runpod.started import standin

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC).timestamp()
HOUR = 3600.0


def pod(id_: str, hours_ago: float, hours: float, job: str = "a-1", final: bool = True) -> RentedPod:
    created = NOW - hours_ago * HOUR
    return RentedPod(id_, "n", 0.5, created, created + hours * HOUR, 0.5 * hours, final, job, job[:1])


def test_costs_add_up_by_run_recipe_and_month() -> None:
    pods = [pod("1", 10, 2), pod("2", 6, 1, "a-2"), pod("3", 2, 4, "b-1", final=False), pod("4", 500, 100, "")]
    by_run = [(each.name, each.pods, round(each.usd, 6)) for each in lines(pods, "run", NOW)]
    assert by_run == [(NOT_KNOWN, 1, 50), ("b-1", 1, 2), ("a-1", 1, 1), ("a-2", 1, 0.5)]
    assert [(each.name, round(each.usd, 6)) for each in lines(pods, "recipe", NOW)][1:] == [("b", 2), ("a", 1.5)]
    months = lines(pods, "month", NOW)
    assert [each.name for each in months] == ["2026-10", "2026-11"]
    assert sum(each.usd for each in months) == pytest.approx(53.5)
    assert months[0].seconds == pytest.approx(8 * HOUR), "from 16:00 on the 31st"
    assert [each.measured_usd for each in lines(pods, "run", NOW)] == [0, 2, 0, 0]


def test_a_forecast_is_what_was_what_is_and_the_trend() -> None:
    pods = [pod("1", 24 * 40, 10), pod("2", 24 * 15, 30), pod("3", 24, 2)]
    found = forecast(pods, 3.0, NOW)
    assert (found.month, round(found.spent_usd, 4), found.days_left) == ("2026-11", 16.0, 9.5)
    assert found.trend_usd_per_day == pytest.approx(16 / 30)
    assert found.usd == pytest.approx(16 + 3 + 9.5 * 16 / 30)


def test_one_busy_day_is_no_trend() -> None:
    assert forecast([pod("1", 10, 10)], 0.0, NOW).trend_usd_per_day == pytest.approx(5 / 7)
    assert forecast([], 0.0, NOW).usd == 0


def test_the_ledger_is_the_bill_to_the_cent(project: Project, store: Store, tmp_path: Path) -> None:
    """One pod that a job had, its twin, and one that nobody had wanted; prices 1000 times as high as RunPod's."""
    with standin(tmp_path / "runpod", price_factor=1000) as cloud, RunPod(cloud.url, cloud.key) as runpod:
        rental = a_rental(store, cloud)
        a_pod(cloud, rental.name)
        a_pod(cloud, pod_name(store, "tickets-9", 3))
        reaper = Reaper(store, runpod, Budgets(run_usd=5), settle_seconds=0.2, final_seconds=0.0)
        reaper.look()
        ledger.want_ended(store, rental.name, "done")
        end = time.monotonic() + 30
        while cloud.alive() or not all(each.final for each in rented_pods(store)):
            assert time.monotonic() < end
            reaper.look()
            reaper.bill(at_once=True)
            time.sleep(0.2)
        truth = cloud.truth()["usd"]
        assert truth > 0.1
        told = json.loads(ft(project, "cost", "--json", **cloud.environment).stdout)
    assert told["usd"] == pytest.approx(truth, abs=0.005)
    assert told["measured_usd"] == 0
    assert {each["run"]: each["pods"] for each in told["lines"]} == {"tickets-1": 2, NOT_KNOWN: 1}


def test_what_is_not_billed_yet_is_marked_and_the_ledger_needs_no_key(project: Project, store: Store) -> None:
    (project.root / "ft.yaml").write_text("budgets: {run_usd: 5, month_usd: 30}\n")
    assert "nothing was rented yet" in ft(project, "cost").stdout
    rental = ledger.intend(
        store, Intent("tickets-1", "tickets", "support", "NVIDIA A40", "secure", 0.5), Budgets(run_usd=5)
    )
    ledger.note_live(store, rental.name, "p1", 0.5)
    store.note("UPDATE rented_pods SET created = ?", (time.time() - 2 * HOUR,))
    shown = ft(project, "cost", "--by", "recipe")
    assert shown.returncode == 0, shown.stderr
    assert "~1.00" in shown.stdout
    assert "budgets: $30 a month, $5 a run" in shown.stdout
    foreseen = ft(project, "cost", "--forecast")
    assert "of $30.00" in foreseen.stdout, foreseen.stderr
    told = json.loads(ft(project, "cost", "--forecast", "--json").stdout)
    assert told["running_usd"] == pytest.approx(4, abs=1.1)


def endpoint(id_: str, hours_ago: float, usd: float, hours: float | None = None) -> RentedPod:
    created = NOW - hours_ago * HOUR
    ended = None if hours is None else created + hours * HOUR
    name = "endpoint tickets"
    return RentedPod(id_, "n", 0.0, created, ended, usd, hours is not None, name, name, "endpoint")


def test_endpoints_have_rows_of_their_model_and_count_in_their_months() -> None:
    pods = [pod("1", 10, 2), endpoint("e1", 500, 20.0, 100), endpoint("e2", 40, 4.0)]
    for by in ("run", "recipe"):
        told = {each.name: each for each in lines(pods, by, NOW)}
        ours = told["endpoint tickets"]
        assert (ours.pods, ours.endpoints, ours.usd, ours.measured_usd, ours.seconds) == (0, 2, 24.0, 4.0, 0)
        assert told["a-1" if by == "run" else "a"].endpoints == 0
    months = {each.name: each for each in lines(pods, "month", NOW)}
    assert (months["2026-10"].endpoints, months["2026-11"].endpoints) == (1, 2)
    assert months["2026-10"].usd == pytest.approx(20 * 8 / 100), "from 16:00 on the 31st"
    assert sum(each.usd for each in months.values()) == pytest.approx(25)


def test_a_forecast_goes_on_with_workers_that_never_sleep_and_counts_them_once() -> None:
    pods = [endpoint("e1", 24 * 30, 60.0), endpoint("e2", 24 * 30, 3.0)]
    plain, awake = forecast(pods, 0.0, NOW), forecast(pods, 0.0, NOW, [("e1", 0.25)])
    assert plain.trend_usd_per_day == pytest.approx(63 / 30)
    assert (plain.awake_usd, awake.spent_usd) == (0.0, plain.spent_usd)
    assert awake.trend_usd_per_day == pytest.approx(3 / 30)
    assert awake.usd == pytest.approx(awake.spent_usd + 9.5 * (24 * 0.25 + 3 / 30))


def test_what_runpod_bills_for_an_endpoint_is_in_ft_cost(project: Project, store: Store, tmp_path: Path) -> None:
    """And as it was billed last, and marked, where RunPod cannot be asked."""
    promote(store, 1)
    with standin(tmp_path / "runpod", price_factor=100, cold_start=0.1) as cloud:
        deployed = made(project, cloud, *DEPLOY, "--yes", "--min-workers", "1", "--max-usd-per-hour", "500")
        end = time.monotonic() + 60
        while not (told := json.loads(ft(project, "cost", "--json", **cloud.environment).stdout))["usd"]:
            assert time.monotonic() < end
            time.sleep(0.2)
        [line] = told["lines"]
        assert (line["run"], line["pods"], line["endpoints"]) == ("endpoint tickets", 0, 1)
        assert line["usd"] == told["measured_usd"] == told["usd"] <= cloud.truth()["usd"] + 0.005
        months = json.loads(ft(project, "cost", "--by", "month", "--json", **cloud.environment).stdout)
        assert sum(each["usd"] for each in months["lines"]) == pytest.approx(months["usd"])
        assert months["usd"] >= told["usd"]
        foreseen = json.loads(ft(project, "cost", "--forecast", "--json", **cloud.environment).stdout)
        [row] = made(project, cloud)
        assert row["id"] == deployed["id"]
        assert foreseen["awake_usd"] == pytest.approx(row["usd_per_hour"] * 24 * foreseen["days_left"], rel=1e-6)
        assert foreseen["usd"] == pytest.approx(foreseen["spent_usd"] + foreseen["awake_usd"])
        assert (
            "for endpoints' workers that never sleep" in ft(project, "cost", "--forecast", **cloud.environment).stdout
        )
        made(project, cloud, "delete", "tickets", "--yes")
        last = json.loads(ft(project, "cost", "--json", **cloud.environment).stdout)["usd"]
    gone = ft(project, "cost", **cloud.environment)
    assert "without RunPod's newest bill" in gone.stderr
    assert f"~{last:.2f}" in gone.stdout
    assert f"${last:.2f} in all" in gone.stdout
    store.note("UPDATE endpoints SET ended = ?", (time.time() - 30 * HOUR,))
    assert json.loads(ft(project, "cost", "--json", **cloud.environment).stdout)["measured_usd"] == last


def test_what_a_reference_was_asked_for_is_in_its_runs_row(project: Project, store: Store) -> None:
    rental = ledger.intend(
        store, Intent("tickets-1", "tickets", "support", "NVIDIA A40", "secure", 0.5), Budgets(run_usd=5)
    )
    ledger.note_live(store, rental.name, "p1", 0.5)
    store.note("UPDATE rented_pods SET created = ?", (time.time() - 2 * HOUR,))
    for run in ("tickets-1", "tickets-2"):
        with reserved(Payer(store, run, "tickets", Budgets(run_usd=9)), "asking gpt", 0.5) as charge:
            charge.spend(0.25)
    told = {each["run"]: each for each in json.loads(ft(project, "cost", "--json").stdout)["lines"]}
    assert (told["tickets-1"]["pods"], told["tickets-2"]["pods"]) == (1, 0)
    assert told["tickets-1"]["usd"] == pytest.approx(1.25, abs=0.01)
    assert told["tickets-2"]["usd"] == told["tickets-2"]["measured_usd"] == 0.25
    by_month = ft(project, "cost", "--by", "month").stdout
    assert "$1.50 in all" in by_month
    assert "~1.50" in by_month

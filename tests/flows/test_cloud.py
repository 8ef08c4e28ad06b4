"""A run that rents, through the stand-in of RunPod and a real S3 to a promoted version; and what goes wrong before."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.worker_process import worker_is_on
from registry.rentals import rentals, rented_pods
from tests.conftest import TinyBase
from tests.fakes.runpod.started import Standin, standin
from tests.flows.tiny_project import Tiny, make_tiny, stand_in
from tests.weed_server import WeedServer

CLOUD = {"gpus": ["NVIDIA A40"], "max_usd_per_hour": 0.5}


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Standin]:
    with standin(tmp_path / "cloud", provision=0.1, start=0.1, grace=5) as found:
        yield found


@pytest.fixture
def tiny(tmp_path: Path, tiny_base: TinyBase, cloud: Standin, s3: WeedServer,
         monkeypatch: pytest.MonkeyPatch) -> Iterator[Tiny]:  # fmt: skip
    made = make_tiny(tmp_path / "project", tiny_base)
    for name, value in {**s3.environment(tmp_path.name), **cloud.environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FT_RUNPOD_IMAGE", "ft")
    monkeypatch.setenv("FT_SETTLE_SECONDS", "2")
    yield made
    made.person.ft("down", exits=None)
    if worker_is_on(made.person.project):
        made.kill_worker()


def write(tiny: Tiny, **keys: Any) -> None:
    tiny.write_recipe(**{"card": "runpod", "cloud": CLOUD, "budget": {"max_usd": 1.0}, **keys})


@pytest.mark.training
def test_a_recipe_that_rents_is_trained_in_a_pod_judged_here_and_promoted(tiny: Tiny, cloud: Standin) -> None:
    write(tiny)
    with stand_in(tiny):
        run_id = tiny.submit("--yes")
        assert tiny.end(run_id).state == "succeeded", tiny.told(run_id)
    result = tiny.run(run_id).result
    assert result["training"]["status"] == "ok"
    assert result["promoted"]["to"] == 1
    assert [each.state for each in rentals(tiny.store, job=run_id)] in (["ending"], ["ended"])
    assert [each["name"] for each in cloud.truth()["pods"]] == [rentals(tiny.store)[0].name]
    assert not cloud.alive()
    assert len(rented_pods(tiny.store)) == 1
    assert "pod: " in tiny.person.ft("logs", run_id)
    assert tiny.types(run_id).count("pod.created") == 1


def test_nobody_is_there_to_be_asked_so_nothing_is_rented(tiny: Tiny, cloud: Standin) -> None:
    write(tiny)
    said = tiny.person.ft("run", "recipes/m.yaml", exits=2)
    assert "this would spend money, and nobody is there to be asked" in said
    assert cloud.truth()["pods"] == []
    assert rentals(tiny.store) == []


def test_what_was_well_is_not_asked_again_at_once(tiny: Tiny, cloud: Standin, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tiny)
    tiny.person.ft("run", "recipes/m.yaml", exits=2)
    asked = len(cloud.requests("GET", "/v2/catalog/gpus"))
    assert asked
    tiny.person.ft("run", "recipes/m.yaml", exits=2)
    assert len(cloud.requests("GET", "/v2/catalog/gpus")) == asked
    kept = tiny.person.project.home / "cloud-checked.json"
    assert cloud.environment["FT_RUNPOD_API_KEY"] not in kept.read_text()
    write(tiny, cloud={"gpus": ["NVIDIA A4000000"]})
    assert "RunPod has no card 'NVIDIA A4000000'" in tiny.person.ft("run", "recipes/m.yaml", exits=2)
    monkeypatch.setenv("FT_RUNPOD_API_KEY", "rpa_wrong")
    write(tiny)
    tiny.person.ft("run", "recipes/m.yaml", exits=1)


BAD: list[tuple[dict[str, Any], dict[str, str], int, str]] = [
    ({}, {"FT_RUNPOD_API_KEY": ""}, 1, "no RunPod key"),
    ({}, {"FT_RUNPOD_API_KEY": "rpa_wrong"}, 1, "key"),
    ({"cloud": {"gpus": ["NVIDIA A4000000"]}}, {}, 2, "A4000000"),
    ({}, {"FT_BUCKET": "s3://no-such-bucket/x"}, 1, "there is no bucket no-such-bucket"),
    ({}, {"FT_S3_SECRET_KEY": "wrong"}, 1, "key is wrong"),
    ({}, {"FT_POD_S3_ACCESS_KEY": ""}, 1, "pods have no key for the bucket"),
    ({}, {"FT_RUNPOD_IMAGE": ""}, 1, "no image for pods is named"),
    ({"budget": {}}, {}, 2, "nothing says what this run may cost"),
    ({"budget": {"max_usd": 0}}, {}, 2, "greater than 0"),
    ({"budget": {"max_usd": 0.0001}}, {}, 2, "is what the run may cost"),
    ({"cloud": {"gpus": ["NVIDIA A40"], "max_usd_per_hour": 0.01}}, {}, 2, "more than cloud.max_usd_per_hour"),
]


def test_what_is_wrong_is_said_before_money_is_spent(
    tiny: Tiny, cloud: Standin, monkeypatch: pytest.MonkeyPatch
) -> None:
    for keys, environment, code, message in BAD:
        write(tiny, **keys)
        with monkeypatch.context() as changed:
            for name, value in environment.items():
                changed.setenv(name, value)
            assert message in tiny.person.ft("run", "recipes/m.yaml", "--yes", exits=code)
    assert cloud.truth()["pods"] == []
    assert rentals(tiny.store) == []


def test_an_account_without_credit_fails_the_run_with_that(tiny: Tiny, cloud: Standin) -> None:
    cloud.account(left=0)
    write(tiny)
    run_id = tiny.submit("--yes")
    run = tiny.end(run_id)
    assert run.state == "failed"
    assert run.error is not None
    assert run.error["error"] == "NoCredit", run.error
    assert [each.state for each in rentals(tiny.store)] == ["void"]


@pytest.mark.training
def test_a_run_that_is_cancelled_ends_its_pod_and_goes_on_from_its_checkpoint_when_resumed(
    tiny: Tiny, cloud: Standin
) -> None:
    tiny_steps = {"max_steps": 400, "checkpoint_steps": 5}
    write(tiny, train=tiny_steps)
    run_id = tiny.submit("--yes")
    tiny.until(lambda: tiny.step(run_id) >= 6 or tiny.run(run_id).ended, run_id)
    tiny.person.ft("cancel", run_id)
    tiny.until(lambda: tiny.run(run_id).state == "cancelled", run_id)
    assert not cloud.alive()
    stopped = tiny.job(run_id).result()
    assert stopped is not None
    assert stopped["status"] == "stopped"
    assert stopped["steps"] >= 6


def test_doctor_tries_the_bucket_with_both_keys_and_asks_runpod(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(subject: str) -> list[str]:
        findings = tiny.person.json("doctor", exits=None)["findings"]
        return [each["state"] for each in findings if each["subject"] == subject]

    assert (found("bucket"), found("RunPod")) == (["ok", "ok"], ["ok"])
    monkeypatch.setenv("FT_POD_S3_SECRET_KEY", "wrong")
    monkeypatch.setenv("FT_RUNPOD_API_KEY", "wrong")
    assert (found("bucket"), found("RunPod")) == (["ok", "missing"], ["missing"])
